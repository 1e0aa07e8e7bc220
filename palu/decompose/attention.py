"""Whitened SVD with errors weighed by what attention makes of them.

Scores see a key's error from queries that are turned by every distance; outputs see values' through the output
projection. So errors are weighed by `SiteStats.metric` M:

    least tr(M E C E^T),  E = W - up @ down:  SVD(M^(1/2) W L) = U S V^T,  up = M^(-1/2) U sqrt(S).
"""

from palu.core.types import Side
from palu.decompose.whiten import Whiten


class Attention(Whiten):
    """`Whiten`, with the metric of `palu.calibrate.metrics` on the sides `weighed`."""

    def __init__(self, *weighed: Side) -> None:
        self.weighed = frozenset(weighed)
