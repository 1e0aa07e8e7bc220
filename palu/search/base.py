"""What a rank search is."""

from collections.abc import Sequence
from typing import Protocol

from palu.core.budget import RankBudget
from palu.core.types import Evidence, RankPlan, SiteShape, Statistic


class RankSearch(Protocol):
    """Shares a budget of ranks out over the sites."""

    needs: frozenset[Statistic]

    def check(self, shapes: Sequence[SiteShape], budget: RankBudget) -> None:
        """Refuse a budget that buys too little, before any work.

        Raises:
            PaluError: with the smallest ratio that would do.
        """
        budget.check(shapes)

    def __call__(self, shapes: Sequence[SiteShape], evidence: Evidence, budget: RankBudget) -> RankPlan:
        """The rank of every site."""
        ...
