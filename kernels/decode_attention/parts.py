"""Sums over parts of the tokens, and what becomes of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from palu.kernels.decode_attention.kernel import combine_kernel
from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latent_scores.layout import divisor, side_of
from palu.kernels.latents import LatentProjection
from palu.kernels.relaunch import relaunch

COMBINE_RANK, COMBINE_PARTS, COMBINE_OUT = 128, 32, 32
# Chunks of COMBINE_RANK latents that fit into registers all at once.
MOST_AHEAD = 4


class Parts(NamedTuple):
    """Sums over ranges of tokens [parts, rows, heads, rank], their weights and peaks, float32 [parts, rows, heads].

    totals: the weights' sums; None if they are one, so that sums are means.
    """

    sums: Tensor
    totals: Tensor | None
    peaks: Tensor


def combine(parts: Parts, value: LatentProjection, query: Tensor, head_dim: int) -> Tensor:
    """The heads' outputs, [rows, num_heads * head_dim]; without an up factor their mean latents side by side."""
    rows, num_heads, _ = query.shape
    ranks = tuple(value.ranks)
    side = side_of(ranks, 16, query.device)
    per_group, stride = num_heads // len(ranks), max(ranks)
    up = query if value.up is None else value.up
    kv_heads = num_heads if value.up is None else up.shape[0] * len(ranks) // head_dim
    width = stride if value.up is None else head_dim
    output = query.new_empty(rows, num_heads, width)
    block = COMBINE_PARTS if parts.sums.shape[0] <= COMBINE_PARTS else 2 * COMBINE_PARTS
    # Every piece reads all parts of its head.
    out = COMBINE_OUT * block // COMBINE_PARTS
    pieces = cdiv(stride, COMBINE_RANK) if value.up is None else cdiv(head_dim, out)
    relaunch(
        combine_kernel, (rows * num_heads, pieces),
        parts.sums, parts.peaks if parts.totals is None else parts.totals, parts.peaks,
        up, up if value.bias is None else value.bias, output, side.rank, side.offset,
        parts.sums.shape[0], rows * num_heads, up.stride(0),
        HEADS=num_heads, HEADS_PER_GROUP=per_group, QUERIES=num_heads // kv_heads, HEAD_DIM=head_dim,
        RANK_STRIDE=stride, BLOCK_RANK=COMBINE_RANK,
        BLOCK_PARTS=block, PASSES=next_power_of_2(cdiv(parts.sums.shape[0], block)),
        AHEAD=cdiv(stride, COMBINE_RANK) <= MOST_AHEAD, BLOCK_OUT=out,
        CHUNKS=cdiv(stride, COMBINE_RANK),
        HAS_TOTALS=parts.totals is not None, HAS_UP=value.up is not None, HAS_BIAS=value.bias is not None,
        DIVISOR=divisor(ranks),
        num_warps=block // 8,
    )  # fmt: skip
    if value.up is not None or len(set(ranks)) == 1:
        return output.view(rows, -1)
    by_group = zip(output.unflatten(1, (len(ranks), per_group)).unbind(1), ranks, strict=True)
    return torch.cat([means[..., :rank].reshape(rows, -1) for means, rank in by_group], dim=-1)
