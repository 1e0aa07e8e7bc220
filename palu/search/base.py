"""What a rank search is."""

from collections.abc import Sequence
from typing import Protocol

from palu.core.budget import RankBudget
from palu.core.types import Evidence, RankPlan, SiteShape, Statistic


class RankSearch(Protocol):
    """Shares a budget of ranks out over the sites."""

    needs: frozenset[Statistic]

    def __call__(self, shapes: Sequence[SiteShape], evidence: Evidence, budget: RankBudget) -> RankPlan:
        """The rank of every site."""
        ...
