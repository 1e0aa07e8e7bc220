"""What a rank search is."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from palu.core.budget import RankBudget
from palu.core.types import RankPlan, Site, SiteShape, Statistic


class RankSearch(Protocol):
    """Shares a budget of ranks out over the sites."""

    needs: frozenset[Statistic]

    def __call__(self, shapes: Sequence[SiteShape], scores: Mapping[Site, float], budget: RankBudget) -> RankPlan:
        """The rank of every site; `scores` is each site's Fisher information, empty where it is not needed."""
        ...
