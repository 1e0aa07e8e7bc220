"""What a projection's errors do to the predictions, as a function of their energy."""

from bisect import bisect_left
from collections.abc import Sequence

Point = tuple[float, float]


class DamageCurve:
    """Linear between points of `palu.calibrate.damage` on their lower convex hull, and beyond the last as before it.

    Damage that levels off would hide what more ranks save.
    """

    def __init__(self, measured: Sequence[Point]) -> None:
        """measured: pairs (energy, nats per token)."""
        self.points = lower_hull([(0.0, 0.0), *sorted(measured)])

    def __call__(self, energy: float) -> float:
        """Nats per token."""
        if len(self.points) == 1:
            return 0.0
        after = min(max(bisect_left(self.points, energy, key=lambda point: point[0]), 1), len(self.points) - 1)
        (low, less), (high, more) = self.points[after - 1 : after + 1]
        return less + (more - less) * (energy - low) / (high - low)


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Of points by rising first number those that no line between two others passes below."""
    hull = [points[0]]
    for point in points[1:]:
        if point[0] <= hull[-1][0]:
            continue
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def slope(one: Point, other: Point) -> float:
    """Rise of the line from one point to another."""
    return (other[1] - one[1]) / (other[0] - one[0])
