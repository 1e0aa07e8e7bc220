"""The same kept fraction everywhere."""

from collections.abc import Sequence

from palu.core.budget import RankBudget, round_to_budget
from palu.core.types import Evidence, RankPlan, SiteShape, Statistic
from palu.search.base import RankSearch


class Uniform(RankSearch):
    """`rank = ratio * group_dim`, as far as the cap allows."""

    needs: frozenset[Statistic] = frozenset()

    def __call__(self, shapes: Sequence[SiteShape], evidence: Evidence, budget: RankBudget) -> RankPlan:
        """The rank of every site."""
        ideal = [min(budget.kept_ratio * shape.group_dim, budget.cap(shape)) for shape in shapes]
        return round_to_budget(shapes, ideal, budget)
