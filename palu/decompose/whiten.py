"""Whitened SVD: the least error of the projection's OUTPUT on the calibration text (Palu, section 3.2)."""

from torch import Tensor

from palu.core.linalg import energy_factors
from palu.core.types import Factors, Side, SiteStats, Statistic


class Whiten:
    """`SVD(W L) = U S V^T` with `C = L L^T` the input's second moment; see `energy_factors` for how."""

    needs: frozenset[Statistic] = frozenset({Statistic.MOMENTS})
    weighed: frozenset[Side] = frozenset()

    def __call__(self, weight: Tensor, stats: SiteStats) -> Factors:
        """Factors of `weight` [group_dim, in_features] for `stats.gram` [in_features, in_features] and its metric."""
        weight, gram = weight.double(), stats.gram.double()
        return energy_factors(weight, weight @ gram @ weight.T, stats.metric)
