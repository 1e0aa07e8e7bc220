"""Whitened SVD with errors weighed by what attention makes of them.

Scores see a key's error from queries that are turned by every distance; outputs see values' through the output
projection. So errors are weighed by `SiteStats.metric` M:

    least tr(M E C E^T),  E = W - up @ down:  SVD(M^(1/2) W L) = U S V^T,  up = M^(-1/2) U sqrt(S).
"""

from torch import Tensor

from palu.core.linalg import energy_factors
from palu.core.types import Factors, Side, SiteStats, Statistic


class Attention:
    """Weighs errors on some sides, which are whitened; on the others as `Whiten`.

    weighed: the sides whose metric is used, by `palu.calibrate.metrics`.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.MOMENTS})

    def __init__(self, *weighed: Side) -> None:
        self.weighed = frozenset(weighed)

    def __call__(self, weight: Tensor, stats: SiteStats) -> Factors:
        """Factors of `weight` [group_dim, in_features] for `stats.gram` and `stats.metric`."""
        weight, gram = weight.double(), stats.gram.double()
        return energy_factors(weight, weight @ gram @ weight.T, stats.metric)
