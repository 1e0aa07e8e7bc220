"""The sites of a stock model, and their weights."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from palu.config import CompressionConfig, head_dim
from palu.core.errors import PaluError
from palu.core.types import SIDES, Side, Site, SiteShape


def projection(model: PreTrainedModel, layer: int, side: Side) -> nn.Linear:
    """The k_proj or v_proj of one layer."""
    attention = model.model.layers[layer].self_attn
    return attention.k_proj if side == "key" else attention.v_proj


def site_shapes(model_config: PreTrainedConfig, config: CompressionConfig) -> list[SiteShape]:
    """Every site of a model, layer by layer, keys before values.

    Raises:
        PaluError: if a group size does not divide the kv heads.
    """
    heads = model_config.num_key_value_heads
    sizes = {side: config.group_size(side, heads) for side in SIDES}
    return [
        SiteShape(Site(layer, side, group), sizes[side] * head_dim(model_config))
        for layer in range(model_config.num_hidden_layers)
        for side in SIDES
        for group in range(heads // sizes[side])
    ]


def site_weight(model: PreTrainedModel, shape: SiteShape) -> Tensor:
    """The rows of a projection that belong to a site, [group_dim, in_features]."""
    site = shape.site
    weight = projection(model, site.layer, site.side).weight.detach()
    return weight[site.group * shape.group_dim : (site.group + 1) * shape.group_dim]


def check_weights(model: PreTrainedModel) -> None:
    """Refuse weights with NaN or infinity before any long work.

    Raises:
        PaluError: naming the tensors.
    """
    bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise PaluError(f"NaN or infinity in the weights: {', '.join(bad[:4])}{', ...' if len(bad) > 4 else ''}")
