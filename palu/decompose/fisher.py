"""Whitened SVD with errors weighed by what they change in the model's predictions.

A small error e of a key or value raises the Kullback-Leibler divergence of the predictions by `1/2 (g . e)^2`, g the
gradient that reaches it. With g and the input taken as independent (K-FAC, arXiv 1503.05671) that is
`1/2 tr(M E C E^T)`, `M = E[g g^T]`, whose least is the whitened SVD of `M^(1/2) W`. Gradients of a few windows are
noisy, so M is blended evenly with the metric of `palu.decompose.attention`, which needs none.
"""

from palu.core.types import Statistic
from palu.decompose.attention import Attention


class Fisher(Attention):
    """`Attention` on both sides, its metric blended with that of `palu.calibrate.fisher.output_fisher`."""

    needs: frozenset[Statistic] = Attention.needs | {Statistic.OUTPUT_FISHER}
