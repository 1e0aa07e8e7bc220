"""What a rank search is."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

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

    def energy_lost(self, energy: Tensor, group: SiteShape, budget: RankBudget) -> float:
        """Energy that some heads' keys lose in a latent of their own with their share of the budget, ranks unrounded.

        Args:
            energy: of all of the heads' ranks, falling, [heads * head_dim].
            group: the group that the heads are, or are a part of.
        """
        kept = min(budget.kept_ratio, budget.cap(group) / group.group_dim)
        return energy[int(kept * len(energy)) :].sum().item()

    def __call__(self, shapes: Sequence[SiteShape], evidence: Evidence, budget: RankBudget) -> RankPlan:
        """The rank of every site."""
        ...
