"""The one factorisation that the decomposition methods share."""

import torch
from torch import Tensor

from palu.core.types import Factors

# Directions whose energy is below this fraction of the largest are scaled as if they had it: the scale cancels in
# up @ down, so it may be anything, and a bounded one never divides by zero.
RELATIVE_ENERGY_FLOOR = 1e-10
# Output directions that cost less than this fraction of the dearest count as if they cost it: else a factor would have
# to be divided by next to nothing.
RELATIVE_METRIC_FLOOR = 1e-6


def energy_factors(weight: Tensor, energy: Tensor, metric: Tensor | None = None) -> Factors:
    """Optimal factors of `weight` for the output energy `energy = weight @ C @ weight.T`.

    The whitened SVD of Palu (arXiv 2407.21118, section 3.2; SVD-LLM) is `W L = U S V^T` with `C = L L^T`,
    `up = U sqrt(S)` and `down = sqrt(S) V^T L^-1`. Because `W C W^T = U S^2 U^T` and `S V^T L^-1 = U^T W`, the same
    factors come from an eigen-decomposition of [group_dim, group_dim]: no SVD of [group_dim, in_features] and no
    inverse of a possibly singular `L`. The dropped energy is the tail of `S^2` exactly.

    With a metric M the error `tr(M E C E^T)` is least: the factors are those of `M^(1/2) W`, whose up factor is then
    multiplied by `M^(-1/2)`; M is scaled to a mean eigenvalue of one, which leaves latents about as large as without.

    Args:
        weight: [group_dim, in_features], any floating dtype.
        energy: [group_dim, group_dim], symmetric positive semi-definite.
        metric: [group_dim, group_dim], symmetric positive semi-definite, or None for the identity.

    Returns:
        float64 factors of full rank `group_dim`, by falling energy; `up @ down` equals `weight`, and dropping the last
        directions makes an error `tr(M E C E^T)` of their energy, but for eigenvalues of M below its floor.
    """
    weight = weight.double()
    energy = energy.double()
    if metric is not None:
        root, inverse, scale = roots(metric)
        factors = energy_factors(root @ weight, root @ energy @ root)
        return Factors(factors.down, inverse @ factors.up, factors.energy * scale)
    squared_singular, basis = torch.linalg.eigh((energy + energy.T) / 2)
    order = torch.arange(squared_singular.numel() - 1, -1, -1, device=weight.device)
    squared_singular, basis = squared_singular[order], basis[:, order]
    largest = squared_singular[0]
    floored = squared_singular.clamp_min(largest * RELATIVE_ENERGY_FLOOR) if largest > 0 else basis.new_ones(len(order))
    scale = floored.pow(0.25)
    down = (basis.T @ weight) / scale[:, None]
    return Factors(down, basis * scale, squared_singular.clamp_min(0.0))


def roots(metric: Tensor) -> tuple[Tensor, Tensor, float]:
    """The root of a positive semi-definite matrix, scaled to a mean eigenvalue of one, its inverse, and the scale.

    Eigenvalues are at least `RELATIVE_METRIC_FLOOR` of the largest; `metric = scale * root @ root`, float64.
    """
    values, basis = torch.linalg.eigh(metric.double())
    if values[-1] > 0:
        values = values.clamp_min(values[-1] * RELATIVE_METRIC_FLOOR)
        scale = values.mean().item()
        root = (values / scale).sqrt()
    else:
        scale, root = 0.0, torch.ones_like(values)
    return (basis * root) @ basis.T, (basis / root) @ basis.T, scale
