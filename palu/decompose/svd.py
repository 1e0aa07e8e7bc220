"""Plain SVD of the weight."""

from torch import Tensor

from palu.core.linalg import energy_factors
from palu.core.types import Factors, Side, SiteStats, Statistic


class Svd:
    """`W = U S V^T`, the input taken as white: `C = I`."""

    needs: frozenset[Statistic] = frozenset()
    weighed: frozenset[Side] = frozenset()

    def __call__(self, weight: Tensor, stats: SiteStats) -> Factors:
        """Factors of `weight` [group_dim, in_features]; `stats` is not used."""
        weight = weight.double()
        return energy_factors(weight, weight @ weight.T)
