"""The op as torch.compile sees it: calls of tensors and numbers, which leave a model's graph whole.

A compiler may put what one step computes where the last one did, so tables are kept for the tensor of positions that
`own_positions` returns: it is new in every step and nothing writes to it.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from palu.kernels.decode_attention.reference import decode_attention as reference_decode_attention
from palu.kernels.latents import LatentProjection, Latents, MixedLatents, Stretch, stretches
from palu.kernels.quantize import PackedLatents, Quantization
from palu.kernels.rotation import Rotation

# Code that travels with a checkpoint may be loaded beside the installed one.
NAMESPACE = re.sub(r"\W", "_", __name__)
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Norm(NamedTuple):
    """A key norm as transformers' RMS norms."""

    weight: Tensor
    variance_epsilon: float

    def __call__(self, states: Tensor) -> Tensor:
        """Normalised in float32, [..., head_dim]."""
        exact = states.float()
        exact = exact * (exact.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * exact.to(states.dtype)


def travels(
    key_latents: Latents, value_latents: Latents, key: LatentProjection, value: LatentProjection, key_norm: Any
) -> bool:
    """Whether a call can be written as tensors and numbers: codes have one scale per head group, and no fine zeros."""
    plain = all(
        part.quantization.scales_whole(side.ranks) and not part.quantization.fine_zeros
        for latents, side in ((key_latents, key), (value_latents, value))
        for part in stretches(latents)
        if isinstance(part, PackedLatents)
    )
    return plain and (key_norm is None or hasattr(key_norm, "variance_epsilon"))


@torch.library.custom_op(f"{NAMESPACE}::own_positions", mutates_args=())
def own_positions(positions: Tensor) -> Tensor:
    """Positions that are written once, in this step."""
    return positions.clone()


@own_positions.register_fake
def _(positions: Tensor) -> Tensor:
    return torch.empty_like(positions)


def compiled_decode_attention(
    query: Tensor, key_latents: Latents, value_latents: Latents, key: LatentProjection, value: LatentProjection,
    rotation: Rotation | None, mask: Tensor | None, scaling: float, key_norm: Any, head_dim: int | None,
) -> Tensor:  # fmt: skip
    """As `op.decode_attention` without probabilities, in one call that `travels`."""
    tensors, bits = [], []
    for latents in (key_latents, value_latents):
        for part in stretches(latents):
            flat, kind = _flattened(part)
            tensors += flat
            bits.append(kind)
        bits.append(0)
    turned = rotation is not None
    _, num_heads, _, width = query.shape
    of_each_group = num_heads // len(value.ranks) * sum(value.ranks)
    features = of_each_group if value.up is None else num_heads * (head_dim or width)
    return _decode_attention(
        query, tensors, bits, key.up, key.bias, list(key.ranks), value.up, value.bias, list(value.ranks),
        rotation.positions if turned else None, rotation.frequencies if turned else None,
        rotation.attention_scaling if turned else 1.0, rotation.tolerance if turned else 0.0, mask, scaling,
        None if key_norm is None else key_norm.weight, 0.0 if key_norm is None else key_norm.variance_epsilon,
        head_dim or 0, features,
    )  # fmt: skip


def _flattened(part: Stretch) -> tuple[list[Tensor], int]:
    """A stretch's tensors, and its bits: 16, those of codes with zero points, or, negative, of codes without."""
    if not isinstance(part, PackedLatents):
        return [part], 16
    if part.zeros is None:
        return [part.codes, part.scales], -part.quantization.bits
    return [part.codes, part.scales, part.zeros], part.quantization.bits


def _latents(tensors: list[Tensor], bits: list[int], ranks: tuple[int, ...]) -> Latents:
    """The stretches of one side, taken off the fronts of both lists."""
    parts: list[Stretch] = []
    while (kind := bits.pop(0)) != 0:
        if kind == 16:
            parts.append(tensors.pop(0))
            continue
        codes, scales = tensors.pop(0), tensors.pop(0)
        zeros = tensors.pop(0) if kind > 0 else None
        parts.append(PackedLatents(codes, scales, zeros, Quantization(abs(kind), ranks, kind < 0)))
    return parts[0] if len(parts) == 1 else MixedLatents(tuple(parts))


@torch.library.custom_op(f"{NAMESPACE}::decode_attention", mutates_args=())
def _decode_attention(
    query: Tensor, tensors: Sequence[Tensor], bits: Sequence[int], key_up: Tensor | None, key_bias: Tensor | None,
    key_ranks: Sequence[int], value_up: Tensor | None, value_bias: Tensor | None, value_ranks: Sequence[int],
    positions: Tensor | None, frequencies: Tensor | None, attention_scaling: float, tolerance: float,
    mask: Tensor | None, scaling: float, norm_weight: Tensor | None, norm_epsilon: float, head_dim: int,
    features: int,
) -> Tensor:  # fmt: skip
    # Here, so that machines without a GPU need no Triton.
    from palu.kernels.decode_attention.launch import can_take, decode_attention

    left, kinds = list(tensors), list(bits)
    key = LatentProjection(key_up, tuple(key_ranks), key_bias)
    value = LatentProjection(value_up, tuple(value_ranks), value_bias)
    call = (query, _latents(left, kinds, key.ranks), _latents(left, kinds, value.ranks), key, value)
    rotation = None
    if positions is not None:
        tables = _tables.setdefault(positions, {})
        rotation = Rotation(positions, frequencies, attention_scaling, tolerance, tables)
    norm = None if norm_weight is None else Norm(norm_weight, norm_epsilon)
    if can_take(*call, rotation, mask, norm):
        return decode_attention(*call, rotation, mask, scaling, norm, head_dim or None)
    return reference_decode_attention(*call, rotation, mask, scaling, norm, head_dim or None)[0].contiguous()


@_decode_attention.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    batch, _, queries, _ = query.shape
    return query.new_empty(batch, queries, others[-1])
