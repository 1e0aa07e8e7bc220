"""Offline changes of a compressed model's weights that leave what it computes as it is."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from palu.config import LatentConfig, head_dim
from palu.core.hadamard import hadamard, hadamard_transform
from palu.core.validate import require
from palu.nn.latent_attention import LatentAttention
from palu.quantization import QuantizationConfig
from palu.token_sparsity import TokenSparsity


def set_cache(model: PreTrainedModel, quantization: QuantizationConfig, sparsity: TokenSparsity | None) -> None:
    """Change how the caches that `model` makes from now on store latents, and of which tokens; None: of all.

    Saved with the model's config.

    Raises:
        PaluError: if one of them excludes the other.
    """
    latent = LatentConfig.from_dict(model.config.palu)
    model.config.palu = dataclasses.replace(latent, quantization=quantization, sparsity=sparsity).to_dict()


def set_quantization(model: PreTrainedModel, quantization: QuantizationConfig) -> None:
    """As `set_cache`, of the tokens that the caches hold now."""
    set_cache(model, quantization, LatentConfig.from_dict(model.config.palu).sparsity)


def set_token_sparsity(model: PreTrainedModel, sparsity: TokenSparsity | None) -> None:
    """As `set_cache`, with latents stored as they are now."""
    set_cache(model, LatentConfig.from_dict(model.config.palu).quantization, sparsity)


@torch.no_grad()
def fold_hadamard(model: PreTrainedModel) -> None:
    """Turn every group's latents by an orthonormal Hadamard matrix: `down <- H down`, `up <- up H^T`, in place.

    Exact but for rounding, free at run time, and it spreads outliers over a group's latents, which quantisation profits
    from (Palu, section 3.4). The config notes it; a model that has it already is left alone.

    Raises:
        PaluError: if a rank has no Hadamard matrix, naming the nearest one; nothing is changed then.
    """
    latent = LatentConfig.from_dict(model.config.palu)
    if latent.hadamard:
        return
    attentions = _attentions(model)
    for rank in sorted({rank for layer in latent.layers for rank in (*layer.key, *layer.value)}):
        hadamard(rank)
    for attention in attentions:
        for projection in (attention.k_proj, attention.v_proj):
            sizes = list(projection.ranks)
            down = projection.down.weight
            down.copy_(torch.cat([hadamard_transform(part) for part in down.split(sizes)]))
            if projection.up is not None:
                projection.up.copy_(_turn_columns(projection.up, sizes))
        if attention.v_proj.up is None:
            attention.o_proj.weight.copy_(_turn_columns(attention.o_proj.weight, attention.value_widths))
    model.config.palu = dataclasses.replace(latent, hadamard=True, quantization=_unsearched(latent)).to_dict()


@torch.no_grad()
def fold_values(model: PreTrainedModel) -> int:
    """Fold the values' up factors (and biases) into o_proj in the layers where that is smaller, in place.

    `o_proj(concat_h B_g(h) l_h) = sum_h (W_h B_g(h)) l_h`: exact but for rounding. A layer's weights are read whole
    at every decoding step, so where the product has fewer numbers than both factors the step is faster too, and prefill
    need not rebuild values. The config notes it.

    Returns:
        The number of layers that are folded now.
    """
    latent = LatentConfig.from_dict(model.config.palu)
    layers = []
    for attention, ranks, sizes in zip(_attentions(model), latent.layers, fusion_sizes(model.config), strict=True):
        if not ranks.fused_values and sizes.pays:
            _fold_values_of(attention)
            ranks = dataclasses.replace(ranks, fused_values=True)
        layers.append(ranks)
    model.config.palu = dataclasses.replace(latent, layers=tuple(layers)).to_dict()
    return sum(ranks.fused_values for ranks in layers)


class FusionSizes(NamedTuple):
    """Weights of one layer's o_proj and value up factors.

    apart, folded: numbers in both apart, and in their product.
    fits: whether a value latent fits into a head (attention kernels want values no wider than keys).
    """

    apart: int
    folded: int
    fits: bool

    @property
    def pays(self) -> bool:
        """Whether folding leaves less to store, and to read at every decoding step."""
        return self.fits and self.folded < self.apart


def fusion_sizes(config: PreTrainedConfig) -> list[FusionSizes]:
    """The sizes in every layer of a compressed model."""
    heads, size = config.num_attention_heads, head_dim(config)
    sizes = []
    for layer in config.latent.layers:
        group_dim = config.num_key_value_heads // len(layer.value) * size
        apart = config.hidden_size * heads * size + group_dim * sum(layer.value)
        folded = config.hidden_size * heads // len(layer.value) * sum(layer.value)
        sizes.append(FusionSizes(apart, folded, max(layer.value) <= size))
    return sizes


def _fold_values_of(attention: LatentAttention) -> None:
    values, output = attention.v_proj, attention.o_proj
    heads = len(attention.value_widths)
    ups = values.up.split(list(values.ranks), dim=1)
    # [kv heads, head_dim, rank of the head's group]
    by_kv_head = [up for group in ups for up in group.unflatten(0, (-1, attention.head_dim))]
    columns = output.weight.unflatten(1, (heads, -1)).double()
    repeats = heads // len(by_kv_head)
    folded = torch.cat([columns[:, head] @ by_kv_head[head // repeats].double() for head in range(heads)], dim=1)
    bias = None if output.bias is None else output.bias.double()
    if values.bias is not None:
        by_head = values.bias.view(-1, attention.head_dim).repeat_interleave(repeats, dim=0)
        passed = output.weight.double() @ by_head.flatten().double()
        bias = passed if bias is None else bias + passed
    attention.o_proj = _linear(folded.to(output.weight), None if bias is None else bias.to(output.weight))
    values.up, values.bias = None, None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight)
    linear.bias = None if bias is None else nn.Parameter(bias)
    return linear


def _turn_columns(factor: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([hadamard_transform(part.T).T for part in factor.split(sizes, dim=1)], dim=1).to(factor)


def _unsearched(latent: LatentConfig) -> QuantizationConfig:
    """Clip ratios were searched for latents that were not turned."""
    return dataclasses.replace(latent.quantization, clip_ratios=None)


def _attentions(model: PreTrainedModel) -> list[LatentAttention]:
    found = [module for module in model.modules() if isinstance(module, LatentAttention)]
    require(
        len(found) == model.config.num_hidden_layers,
        "this model's classes come from its checkpoint; import palu before loading it to change its weights",
    )
    return found
