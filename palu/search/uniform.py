"""The same kept fraction everywhere."""

from collections.abc import Sequence

from palu.core.budget import RankBudget, round_to_budget
from palu.core.types import Evidence, RankPlan, SiteShape, Statistic
from palu.search.base import RankSearch


class Uniform(RankSearch):
    """`rank = ratio * group_dim`."""

    needs: frozenset[Statistic] = frozenset()

    def __call__(self, shapes: Sequence[SiteShape], evidence: Evidence, budget: RankBudget) -> RankPlan:
        """The rank of every site."""
        return round_to_budget(shapes, [budget.kept_ratio * shape.group_dim for shape in shapes], budget)
