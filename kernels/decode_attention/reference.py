"""Attention of a few query tokens over key and value latents: the plain PyTorch definition.

Keys are rebuilt and rotated by their own positions, a block of tokens at a time; values are never rebuilt: the
probabilities weigh the latents and the up factor is applied to the sum (Palu, section 3.1).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palu.kernels.latent_scores.reference import latent_scores
from palu.kernels.latents import LatentProjection, Latents, Stretch, blocks
from palu.kernels.quantize import SMALLEST_SCALE, PackedLatents
from palu.kernels.reconstruct.reference import BLOCK_LENGTH
from palu.kernels.rotation import Rotation

# Sum of the softmax weights while they multiply latents. In fp16 a sum of 1 would make the weights of long contexts
# subnormal, a large one would let the product with 8-bit codes overflow.
WEIGHT_SUM = 16.0


def decode_attention(
    query: Tensor,
    key_latents: Latents,
    value_latents: Latents,
    key: LatentProjection,
    value: LatentProjection,
    rotation: Rotation | None,
    mask: Tensor | None,
    scaling: float,
    key_norm: Callable[[Tensor], Tensor] | None = None,
    head_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(q . RoPE(norm(B_k c_k)) * scaling + mask) . c_v`, then `B_v`.

    Args:
        query: [batch, num_heads, queries, head_dim], rotated; without a key up factor it is already multiplied with it
            (absorbed, no rotation then): [batch, num_heads, queries, largest rank], of which a head uses its group's.
        key_latents, value_latents: [batch, length, sum(ranks)]; packed ones are never dequantised, their scales touch
            only rebuilt keys and probabilities.
        key, value: the up sides.
        rotation: the cached positions, or None: no rotation.
        mask: None, or boolean (True = attend) or additive, [batch or 1, 1 or num_heads, queries, length].
        key_norm: applied to rebuilt keys [..., head_dim] before the rotation (Qwen3), or None.
        head_dim: of the values, where the query is absorbed; else the query's.

    Returns:
        The heads' outputs side by side, [batch, queries, num_heads * head_dim], or, without a value up factor, their
        sums of latents [batch, queries, sum of the heads' ranks]; and the probabilities [batch, num_heads, queries,
        length]. Both of `query`'s dtype.
    """
    # Scaled before the product, so that scores of 16-bit tensors do not overflow.
    query = query * scaling
    scores = latent_scores(query, key_latents, key, rotation, key_norm).float()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    probabilities = torch.softmax(scores, dim=-1)
    weights = (probabilities * WEIGHT_SUM).to(query.dtype)
    return _absorbed_values(weights, value_latents, value, head_dim or query.shape[-1]), probabilities.to(query.dtype)


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
