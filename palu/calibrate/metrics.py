"""What errors of keys and values cost: quadratic forms on a site's outputs."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palu.calibrate.moments import LayerMoments
from palu.calibrate.sites import site_weight
from palu.config import head_dim
from palu.core.types import SiteShape


def site_metric(model: PreTrainedModel, shape: SiteShape, moments: LayerMoments) -> Tensor:
    """The metric of a site, float64 [group_dim, group_dim]."""
    return _key_metric(model, shape, moments) if shape.site.side == "key" else _value_metric(model, shape)


def _key_metric(model: PreTrainedModel, shape: SiteShape, moments: LayerMoments) -> Tensor:
    """Energy of the queries that meet a key, per rotation pair, on the diagonal.

    Averaged over distances, a score's squared error is `sum_j lambda_j (e_j^2 + e_{j+D/2}^2)`, `lambda_j` the mean of
    both numbers' squares, added up over the kv head's queries. Where keys are normalised (Qwen3), an error of theirs is
    divided by the key's root mean square, which counts with its mean over tokens, and multiplied by the norm's weight.
    """
    size, site = head_dim(model.config), shape.site
    heads = shape.group_dim // size
    energy = moments.query_energy[site.group * heads : (site.group + 1) * heads].double()
    pairs = (energy[:, : size // 2] + energy[:, size // 2 :]) / 2
    cost = torch.cat([pairs, pairs], dim=1)
    norm = getattr(model.model.layers[site.layer].self_attn, "k_norm", None)
    if norm is not None:
        weight = site_weight(model, shape).double()
        squares = ((weight @ moments.gram.double()) * weight).sum(1).view(heads, size).mean(1, keepdim=True)
        cost = cost * norm.weight.detach().double() ** 2 / squares
    return torch.diag(cost.flatten())


def _value_metric(model: PreTrainedModel, shape: SiteShape) -> Tensor:
    """What the output projection makes of every head's values: `sum Wo_h^T Wo_h` over a kv head's query heads."""
    size, site = head_dim(model.config), shape.site
    output = model.model.layers[site.layer].self_attn.o_proj.weight.detach().double()
    kv_heads = model.config.num_key_value_heads
    by_kv_head = output.unflatten(1, (kv_heads, -1, size))
    heads = shape.group_dim // size
    own = by_kv_head[:, site.group * heads : (site.group + 1) * heads]
    return torch.block_diag(*torch.einsum("okqd,okqe->kde", own, own))
