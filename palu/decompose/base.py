"""What a decomposition method is."""

from typing import Protocol

from torch import Tensor

from palu.core.types import Factors, SiteStats, Statistic


class Decomposition(Protocol):
    """Splits one site's weight into factors ordered by importance."""

    needs: frozenset[Statistic]

    def __call__(self, weight: Tensor, stats: SiteStats) -> Factors:
        """Factor `weight` [group_dim, in_features]; returns float64 factors of full rank."""
        ...
