"""Every group's rank in proportion to its Fisher information (Palu, section 3.3)."""

from collections.abc import Sequence

from palu.core.budget import RankBudget, round_to_budget, share_proportionally
from palu.core.types import Evidence, RankPlan, SiteShape, Statistic
from palu.search.base import RankSearch


class Fisher(RankSearch):
    """`rank_i = total * F_i d_i / sum_j F_j d_j`, capped at d_i, keys at `max_key_rank` as well."""

    needs: frozenset[Statistic] = frozenset({Statistic.FISHER})

    def __call__(self, shapes: Sequence[SiteShape], evidence: Evidence, budget: RankBudget) -> RankPlan:
        """The rank of every site."""
        weights = [evidence.fisher[shape.site] * shape.group_dim for shape in shapes]
        ideal = share_proportionally(weights, [budget.cap(shape) for shape in shapes], budget.total(shapes))
        return round_to_budget(shapes, ideal, budget)
