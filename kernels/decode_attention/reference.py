"""Attention of a few query tokens over key and value latents: the plain PyTorch definition.

Keys are rebuilt and rotated by their own positions, a block of tokens at a time; values are never rebuilt: the
probabilities weigh the latents and the up factor is applied to the sum (Palu, section 3.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palu.kernels.latents import Latents, Stretch, blocks
from palu.kernels.quantize import SMALLEST_SCALE, PackedLatents
from palu.kernels.reconstruct.reference import BLOCK_LENGTH, reconstruct

# Sum of the softmax weights while they multiply latents. In fp16 a sum of 1 would make the weights of long contexts
# subnormal, a large one would let the product with 8-bit codes overflow.
WEIGHT_SUM = 16.0


@dataclass(frozen=True)
class LatentProjection:
    """The up side of a low-rank projection.

    up: [group_dim, sum(ranks)], or None where it is folded into what comes after; bias: [num_kv_heads * head_dim] or
    None.
    """

    up: Tensor | None
    ranks: Sequence[int]
    bias: Tensor | None


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split pairing (RoFormer, arXiv 2104.09864).

    Args:
        states: [..., heads, length, head_dim]; cos, sin: broadcastable to it.
    """
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def decode_attention(
    query: Tensor,
    key_latents: Latents,
    value_latents: Latents,
    key: LatentProjection,
    value: LatentProjection,
    rotation: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scaling: float,
    key_norm: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(q . RoPE(norm(B_k c_k)) * scaling + mask) . c_v`, then `B_v`.

    Args:
        query: [batch, num_heads, queries, head_dim], rotated.
        key_latents, value_latents: [batch, length, sum(ranks)]; packed ones are never dequantised, their scales touch
            only rebuilt keys and probabilities.
        key, value: the up sides.
        rotation: cos and sin of the cached positions, [batch or 1, length, head_dim].
        mask: None, or boolean (True = attend) or additive, [batch or 1, 1 or num_heads, queries, length].
        key_norm: applied to rebuilt keys [..., head_dim] before the rotation (Qwen3), or None.

    Returns:
        The heads' outputs side by side, [batch, queries, num_heads * head_dim], or, without a value up factor, their
        sums of latents [batch, queries, sum of the heads' ranks]; and the probabilities [batch, num_heads, queries,
        length]. Both of `query`'s dtype.
    """
    # Scaled before the product, so that scores of 16-bit tensors do not overflow.
    query = query * scaling
    scores = []
    for start, block in blocks(key_latents, BLOCK_LENGTH):
        tables = tuple(table.narrow(1, start, block.shape[1]) for table in rotation)
        scores.append(_block_scores(query, block, key, tables, key_norm))
    scores = torch.cat(scores, dim=-1).float()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    probabilities = torch.softmax(scores, dim=-1)
    weights = (probabilities * WEIGHT_SUM).to(query.dtype)
    return _absorbed_values(weights, value_latents, value, query.shape[-1]), probabilities.to(query.dtype)


def _block_scores(
    query: Tensor,
    latents: Stretch,
    key: LatentProjection,
    rotation: tuple[Tensor, Tensor],
    key_norm: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Scores of one block of tokens, [batch, num_heads, queries, block]."""
    batch, num_heads, queries, head_dim = query.shape
    keys = reconstruct(latents, key.up, key.ranks, key.bias)
    keys = keys.view(batch, latents.shape[1], -1, head_dim)
    if key_norm is not None:
        keys = key_norm(keys)
    cos, sin = rotation
    keys = rotate(keys.transpose(1, 2), cos[:, None], sin[:, None])
    num_kv_heads = keys.shape[1]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)
    return (grouped @ keys.transpose(-1, -2)).view(batch, num_heads, queries, -1)


def _absorbed_values(weights: Tensor, latents: Latents, value: LatentProjection, head_dim: int) -> Tensor:
    """Mean of the latents, then the up factor where there is one: [batch, queries, features].

    weights: [batch, num_heads, queries, length], of sum `WEIGHT_SUM`.
    """
    batch, num_heads, queries, length = weights.shape
    by_group = weights.view(batch, len(value.ranks), -1, length)
    heads_per_group = num_heads // len(value.ranks)
    means = [
        (summed.view(batch, heads_per_group, queries, -1) / WEIGHT_SUM).to(weights.dtype)
        for summed in _weighted_sums(by_group, latents, value.ranks)
    ]
    return expand_values(means, value, head_dim)


def expand_values(means: Sequence[Tensor], value: LatentProjection, head_dim: int) -> Tensor:
    """Mean latents to the heads' outputs side by side, [batch, queries, features].

    Args:
        means: for every value group [batch, query heads of the group, queries, rank].
    """
    batch, heads_per_group, queries, _ = means[0].shape
    outputs, offset = [], 0
    for mean, rank in zip(means, value.ranks, strict=True):
        if value.up is not None:
            up = value.up[:, offset : offset + rank].view(-1, head_dim, rank)
            mean = mean.reshape(batch, up.shape[0], -1, rank) @ up.transpose(-1, -2)
            mean = mean.view(batch, heads_per_group, queries, head_dim)
        outputs.append(mean.transpose(1, 2).reshape(batch, queries, -1))
        offset += rank
    output = torch.cat(outputs, dim=-1)
    if value.bias is not None:
        # Probabilities sum to one, so the bias passes through the weighted sum unchanged.
        kv_heads = value.bias.view(-1, 1, head_dim)
        repeats = heads_per_group * len(value.ranks) // kv_heads.shape[0]
        output = output + kv_heads.expand(-1, repeats, -1).reshape(-1)
    return output


def _weighted_sums(weights: Tensor, latents: Latents, ranks: Sequence[int]) -> list[Tensor]:
    """For every group `sum_t p_t x_t`, float32 or better [batch, rows, rank]; weights [batch, groups, rows, length]."""
    totals: list[Tensor] = []
    for start, block in blocks(latents, BLOCK_LENGTH):
        sums = _block_sums(weights.narrow(-1, start, block.shape[1]), block, ranks)
        totals = sums if not totals else [total + part for total, part in zip(totals, sums, strict=True)]
    return totals


def _block_sums(weights: Tensor, latents: Stretch, ranks: Sequence[int]) -> list[Tensor]:
    """The sums over one block. Packed: `sum_t (p_t s_t) c_t - (sum_t p_t s_t z_t) 1`, a product of codes."""
    precise = torch.promote_types(weights.dtype, torch.float32)
    if not isinstance(latents, PackedLatents):
        parts = latents.split(list(ranks), dim=-1)
        return [(weights[:, group] @ part).to(precise) for group, part in enumerate(parts)]
    shifts = latents.shifts()
    # Over the block's largest scale, so that small scales do not make subnormal 16-bit weights.
    scales = latents.scales.to(precise)
    peaks = scales.amax(dim=1, keepdim=True).clamp_min(SMALLEST_SCALE)
    scales = scales / peaks
    sums = []
    for group, pieces in enumerate(latents.pieces(ranks)):
        parts = []
        for index, offset, width in pieces:
            scaled = weights[:, group] * scales[:, None, :, index].to(weights.dtype)
            part = (scaled @ latents.centred(scaled.dtype, offset, width)).to(precise)
            if shifts is not None:
                part = part - (scaled.to(precise) * shifts[:, None, :, index]).sum(-1, keepdim=True)
            parts.append(part * peaks[:, :, index, None])
        sums.append(torch.cat(parts, dim=-1))
    return sums
