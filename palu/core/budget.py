"""Exact rank budgets: ideal real-valued ranks in, allowed integer ranks out, the total never above the budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from palu.core.errors import PaluError
from palu.core.types import RankPlan, SiteShape


@dataclass(frozen=True)
class RankBudget:
    """What a search may spend.

    kept_ratio: kept fraction of the uncompressed cache, in (0, 1].
    rank_multiple: every rank is a multiple of this, or the group's full dimension.
    """

    kept_ratio: float
    rank_multiple: int

    def total(self, shapes: Sequence[SiteShape]) -> int:
        """The largest allowed sum of ranks over `shapes`."""
        # The small slack keeps 0.7 * 10 = 7.000000000000001-like products from losing or gaining a rank.
        return math.floor(self.kept_ratio * sum(shape.group_dim for shape in shapes) + 1e-9)

    def check(self, shapes: Sequence[SiteShape]) -> None:
        """Refuse a budget too small for the smallest rank everywhere.

        Raises:
            PaluError: with the smallest ratio that would do.
        """
        caps = [shape.group_dim for shape in shapes]
        least = sum(min(self.rank_multiple, cap) for cap in caps)
        if least > self.total(shapes):
            raise PaluError(
                f"param_ratio_target {self.kept_ratio} leaves {self.total(shapes)} ranks for {len(shapes)} groups, "
                f"fewer than rank_multiple {self.rank_multiple} each; use a ratio of at least "
                f"{least / sum(caps):.3f} or a smaller rank_multiple"
            )


def share_proportionally(weights: Sequence[float], caps: Sequence[int], total: float) -> list[float]:
    """Split `total` in proportion to `weights`, none above its cap; what a cap cuts off goes to the others.

    Weights that are all zero count as equal.
    """
    shares = [0.0] * len(caps)
    open_sites = set(range(len(caps)))
    remaining = total
    while open_sites and remaining > 1e-9:
        weight_sum = sum(weights[i] for i in open_sites)
        if weight_sum > 0:
            wanted = {i: remaining * weights[i] / weight_sum for i in open_sites}
        else:
            wanted = {i: remaining / len(open_sites) for i in open_sites}
        full = [i for i in open_sites if wanted[i] >= caps[i]]
        if not full:
            for i in open_sites:
                shares[i] = wanted[i]
            break
        for i in full:
            shares[i] = float(caps[i])
            remaining -= caps[i]
            open_sites.remove(i)
    return shares


def round_to_budget(shapes: Sequence[SiteShape], ideal: Sequence[float], budget: RankBudget) -> RankPlan:
    """Round ideal ranks down to allowed ones, then give what is left to the largest remainders.

    Every site keeps at least one multiple. Equal remainders are served values before keys (the more sensitive side),
    a projection's groups together, spread evenly over the depth.

    Raises:
        PaluError: if not even the smallest rank fits everywhere.
    """
    budget.check(shapes)
    multiple, total = budget.rank_multiple, budget.total(shapes)
    caps = [shape.group_dim for shape in shapes]
    smallest = [min(multiple, cap) for cap in caps]
    ranks = [
        cap if want >= cap else max(low, math.floor(want / multiple + 1e-9) * multiple)
        for want, cap, low in zip(ideal, caps, smallest, strict=True)
    ]
    _lower_until_within(ranks, ideal, smallest, multiple, total)
    _raise_largest_remainders(ranks, ideal, caps, multiple, total, tie_order(shapes))
    return RankPlan({shape.site: rank for shape, rank in zip(shapes, ranks, strict=True)})


def _lower_until_within(
    ranks: list[int], ideal: Sequence[float], smallest: Sequence[int], multiple: int, total: int
) -> None:
    """Lifting sites to the smallest rank may overshoot: take it back where a rank exceeds its ideal most."""
    while sum(ranks) > total:
        lowerable = [i for i in range(len(ranks)) if ranks[i] > smallest[i]]
        loser = max(lowerable, key=lambda i: (ranks[i] - ideal[i], ranks[i]))
        ranks[loser] = max(smallest[loser], (ranks[loser] - 1) // multiple * multiple)


def _raise_largest_remainders(
    ranks: list[int], ideal: Sequence[float], caps: Sequence[int], multiple: int, total: int, place: Sequence[int]
) -> None:
    """Spend what is left, one step at a time, on the site that is furthest below its ideal rank."""
    while True:
        left = total - sum(ranks)
        steps = {i: min(multiple, caps[i] - ranks[i]) for i in range(len(ranks)) if ranks[i] < caps[i]}
        affordable = [i for i, step in steps.items() if step <= left]
        if not affordable:
            return
        winner = max(affordable, key=lambda i: (round(ideal[i] - ranks[i], 6), -place[i]))
        ranks[winner] += steps[winner]


def tie_order(shapes: Sequence[SiteShape]) -> list[int]:
    """Place of every site when remainders are equal: values first, then layers in golden-ratio order, then groups."""
    golden = (math.sqrt(5) - 1) / 2

    def rule(index: int) -> tuple[bool, float, int]:
        site = shapes[index].site
        return site.side == "key", (site.layer * golden) % 1.0, site.group

    place = [0] * len(shapes)
    for position, index in enumerate(sorted(range(len(shapes)), key=rule)):
        place[index] = position
    return place
