"""Fisher information shares the budget out over projections, whose groups get equal ranks (Palu's default)."""

from collections import defaultdict
from collections.abc import Sequence

from palu.core.budget import RankBudget, round_to_budget, share_proportionally
from palu.core.types import Evidence, RankPlan, Side, SiteShape, Statistic


class FisherUniform:
    """As `fisher`, with a projection's mean score in place of its groups'."""

    needs: frozenset[Statistic] = frozenset({Statistic.FISHER})

    def __call__(self, shapes: Sequence[SiteShape], evidence: Evidence, budget: RankBudget) -> RankPlan:
        """The rank of every site."""
        by_projection: dict[tuple[int, Side], list[float]] = defaultdict(list)
        for shape in shapes:
            by_projection[shape.site.layer, shape.site.side].append(evidence.fisher[shape.site])
        mean = {key: sum(group) / len(group) for key, group in by_projection.items()}
        weights = [mean[shape.site.layer, shape.site.side] * shape.group_dim for shape in shapes]
        ideal = share_proportionally(weights, [shape.group_dim for shape in shapes], budget.total(shapes))
        return round_to_budget(shapes, ideal, budget)
