"""Attention of a few query tokens over key and value latents: the plain PyTorch definition.

Keys are rebuilt and rotated by their own positions, a block of tokens at a time; values are never rebuilt: the
probabilities weigh the latents and the up factor is applied to the sum (Palu, section 3.1).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palu.kernels.quantize import PackedLatents
from palu.kernels.reconstruct.reference import reconstruct

# Tokens whose keys are rebuilt at a time: bounds the transient memory, large enough to keep matrix products efficient.
BLOCK_LENGTH = 4096


@dataclass(frozen=True)
class LatentProjection:
    """The up side of a low-rank projection.

    up: [group_dim, sum(ranks)]; bias: [num_kv_heads * head_dim] or None.
    """

    up: Tensor
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
    key_latents: Tensor | PackedLatents,
    value_latents: Tensor | PackedLatents,
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
        The output [batch, queries, num_heads, head_dim] and the probabilities [batch, num_heads, queries, length],
        both of `query`'s dtype.
    """
    # Scaled before the product, so that scores of 16-bit tensors do not overflow.
    query = query * scaling
    blocks = []
    for start in range(0, key_latents.shape[1], BLOCK_LENGTH):
        length = min(BLOCK_LENGTH, key_latents.shape[1] - start)
        tables = tuple(table.narrow(1, start, length) for table in rotation)
        latents = key_latents.narrow(1, start, length)
        blocks.append(_block_scores(query, latents, key, tables, key_norm))
    scores = torch.cat(blocks, dim=-1)
    scores = scores.float()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    probabilities = torch.softmax(scores, dim=-1).to(query.dtype)
    output = _absorbed_values(probabilities, value_latents, value, query.shape[-1])
    return output.transpose(1, 2), probabilities


def _block_scores(
    query: Tensor,
    latents: Tensor | PackedLatents,
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


def _absorbed_values(
    probabilities: Tensor, latents: Tensor | PackedLatents, value: LatentProjection, head_dim: int
) -> Tensor:
    """Weighted sum of the latents, then the up factor: [batch, num_heads, queries, head_dim]."""
    batch, num_heads, queries, length = probabilities.shape
    kv_heads_per_group = value.up.shape[0] // head_dim
    by_group = probabilities.view(batch, len(value.ranks), -1, length)
    outputs = []
    offset = 0
    for rank, summed in zip(value.ranks, _weighted_sums(by_group, latents, value.ranks), strict=True):
        up = value.up[:, offset : offset + rank].view(kv_heads_per_group, head_dim, rank)
        outputs.append(summed.view(batch, kv_heads_per_group, -1, rank) @ up.transpose(-1, -2))
        offset += rank
    output = torch.cat(outputs, dim=1)
    if value.bias is not None:
        # Probabilities sum to one, so the bias passes through the weighted sum unchanged.
        output = output + value.bias.view(-1, 1, head_dim)
    return output.reshape(batch, num_heads, queries, head_dim)


def _weighted_sums(probabilities: Tensor, latents: Tensor | PackedLatents, ranks: Sequence[int]) -> Iterator[Tensor]:
    """For every group `sum_t p_t x_t`, [batch, rows, rank], from probabilities [batch, groups, rows, length].

    Packed: `sum_t (p_t s_t) c_t - (sum_t p_t s_t z_t) 1`, so that the product sees codes.
    """
    if not isinstance(latents, PackedLatents):
        for group, part in enumerate(latents.split(list(ranks), dim=-1)):
            yield probabilities[:, group] @ part
        return
    codes = latents.unpacked().to(probabilities.dtype)
    scales, zeros = (parameter.to(probabilities.dtype) for parameter in (latents.scales, latents.zero_points()))
    for group, pieces in enumerate(latents.pieces(ranks)):
        sums = []
        for index, offset, width in pieces:
            scaled = probabilities[:, group] * scales[:, None, :, index]
            shift = (scaled * zeros[:, None, :, index]).sum(-1, keepdim=True)
            sums.append(scaled @ codes[..., offset : offset + width] - shift)
        yield torch.cat(sums, dim=-1)
