"""What errors of keys and values cost: quadratic forms on a site's outputs."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palu.calibrate.moments import LayerMoments
from palu.calibrate.sites import projection, site_weight
from palu.config import head_dim
from palu.core.types import SiteShape


def site_metric(model: PreTrainedModel, shape: SiteShape, moments: LayerMoments, distances: int) -> Tensor:
    """The metric of a site, float64 [group_dim, group_dim].

    distances: tokens of a calibration window, between whose positions queries meet keys.
    """
    if shape.site.side == "value":
        return _value_metric(model, shape)
    return _key_metric(model, shape, moments, distances)


def blend(*metrics: Tensor) -> Tensor:
    """The mean of metrics [groups, group_dim, group_dim], each scaled to a mean eigenvalue of one over all groups.

    What groups weigh against each other stays. A metric of zeros stays so.
    """
    means = (metric.double().diagonal(dim1=1, dim2=2).mean().clamp_min(1e-300) for metric in metrics)
    return sum(metric.double() / mean for metric, mean in zip(metrics, means, strict=True)) / len(metrics)


def averaged_over_distances(gram: Tensor, frequencies: Tensor, distances: int) -> Tensor:
    """`E[R(d) q q^T R(d)^T]` of `gram = E[q q^T]`, [..., head_dim, head_dim], over all pairs of a causal window.

    What a squared error of a key costs before it is rotated: scores see it from a query that is turned by the distance
    d, which `distances - d` pairs of tokens have. With pairs of numbers as complex ones, `z = q_j + i q_{j+D/2}`, the
    turned query's `E[z z^*]` and `E[z z]` are those of the query times the means of `exp(i d (w_j - w_k))` and of
    `exp(i d (w_j + w_k))`: the energies of fast pairs, and what slow pairs have in common besides.
    """
    distance = torch.arange(distances, dtype=torch.float64, device=gram.device)
    weight = (distances - distance) / (distances * (distances + 1) / 2)
    phase = torch.exp(1j * frequencies.double()[:, None] * distance)
    same, other = (phase * weight) @ phase.conj().T, (phase * weight) @ phase.T
    half = gram.shape[-1] // 2
    (aa, ab), (ba, bb) = (rows.split(half, dim=-1) for rows in gram.double().split(half, dim=-2))
    same = same * torch.complex(aa + bb, ba - ab)
    other = other * torch.complex(aa - bb, ba + ab)
    first = torch.cat([(same + other).real, (other - same).imag], dim=-1)
    second = torch.cat([(same + other).imag, (same - other).real], dim=-1)
    return torch.cat([first, second], dim=-2) / 2


def _key_metric(model: PreTrainedModel, shape: SiteShape, moments: LayerMoments, distances: int) -> Tensor:
    """Head after head, the queries' Gram averaged over distances.

    Where keys are normalised (Qwen3), an error of theirs is multiplied by the norm's weights and divided by the key's
    root mean square, which counts with its mean over tokens.
    """
    size, site = head_dim(model.config), shape.site
    heads = slice(site.group * shape.group_dim // size, (site.group + 1) * shape.group_dim // size)
    metric = averaged_over_distances(moments.query_gram[heads], model.model.rotary_emb.inv_freq, distances)
    norm = getattr(model.model.layers[site.layer].self_attn, "k_norm", None)
    if norm is not None:
        weight = norm.weight.detach().double()
        squares = _mean_squares(model, shape, moments).view(-1, size).mean(1) + norm.variance_epsilon
        metric = metric * (weight[:, None] * weight) / squares[:, None, None]
    return torch.block_diag(*metric)


def _mean_squares(model: PreTrainedModel, shape: SiteShape, moments: LayerMoments) -> Tensor:
    """`E[k^2]` of a site's keys before their norm, [group_dim]."""
    weight = site_weight(model, shape).double()
    squares = ((weight @ moments.gram.double()) * weight).sum(1)
    bias = projection(model, shape.site.layer, shape.site.side).bias
    if bias is not None:
        bias = bias.detach().double().view(-1, shape.group_dim)[shape.site.group]
        squares = squares + 2 * bias * (weight @ moments.mean.double()) + bias**2
    return squares


def _value_metric(model: PreTrainedModel, shape: SiteShape) -> Tensor:
    """What the output projection makes of every head's values: `sum Wo_h^T Wo_h` over a kv head's query heads."""
    size, site = head_dim(model.config), shape.site
    output = model.model.layers[site.layer].self_attn.o_proj.weight.detach()
    by_kv_head = output.unflatten(1, (model.config.num_key_value_heads, -1, size))
    heads = shape.group_dim // size
    own = by_kv_head[:, site.group * heads : (site.group + 1) * heads].double()
    return torch.block_diag(*torch.einsum("okqd,okqe->kde", own, own))
