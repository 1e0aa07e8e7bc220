"""What a decomposition method is."""

from typing import Protocol

from torch import Tensor

from palu.core.types import Factors, Side, SiteStats, Statistic


class Decomposition(Protocol):
    """Splits one site's weight into factors ordered by importance."""

    needs: frozenset[Statistic]
    # Sides on which errors are weighed by a metric.
    weighed: frozenset[Side]

    def __call__(self, weight: Tensor, stats: SiteStats) -> Factors:
        """Factor `weight` [group_dim, in_features]; returns float64 factors of full rank."""
        ...
