"""Whitened SVD with errors weighed by what they change in the model's predictions.

A small error e of a key or value raises the Kullback-Leibler divergence of the predictions by `1/2 (g . e)^2`, g the
gradient that reaches it. With g and the input taken as independent (K-FAC, arXiv 1503.05671), that is
`1/2 tr(M E C E^T)`, `M = E[g g^T]`, whose least is the whitened SVD of `M^(1/2) W`.
"""

from palu.core.types import SIDES, Side, Statistic
from palu.decompose.whiten import Whiten


class Fisher(Whiten):
    """`Whiten`, with `palu.calibrate.fisher.output_fisher` as the metric; energies are twice the nats per token."""

    needs: frozenset[Statistic] = frozenset({Statistic.MOMENTS, Statistic.OUTPUT_FISHER})
    weighed: frozenset[Side] = frozenset(SIDES)
