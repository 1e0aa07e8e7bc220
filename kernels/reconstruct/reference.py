"""Latents back to full keys or values: the plain PyTorch definition."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palu.kernels.latents import Latents, Stretch, blocks
from palu.kernels.quantize import PackedLatents

# Tokens that are rebuilt at a time: bounds the transient memory, large enough to keep matrix products efficient.
BLOCK_LENGTH = 4096


def reconstruct(
    latents: Latents,
    up: Tensor,
    ranks: Sequence[int],
    bias: Tensor | None = None,
    span: tuple[int, int] | None = None,
) -> Tensor:
    """Rebuild a projection's output, or a part of it, from its groups' latents.

    Args:
        latents: [batch, length, sum(ranks)], groups side by side; packed latents are multiplied as codes.
        up: [group_dim, sum(ranks)], the groups' up factors side by side.
        ranks: rank of every group.
        bias: [groups * group_dim] or None.
        span: the first output wanted and the one behind the last; all if None.

    Returns:
        [batch, length, outputs], dtype of `up`.
    """
    group_dim = up.shape[0]
    first, last = (0, group_dim * len(ranks)) if span is None else span
    rebuilt = [_rebuild_block(block, up, ranks, range(first, last)) for _, block in blocks(latents, BLOCK_LENGTH)]
    full = rebuilt[0] if len(rebuilt) == 1 else torch.cat(rebuilt, dim=1)
    return full if bias is None else full + bias[first:last]


def _rebuild_block(block: Stretch, up: Tensor, ranks: Sequence[int], outputs: range) -> Tensor:
    group_dim, offset, parts = up.shape[0], 0, []
    for group, rank in enumerate(ranks):
        low = max(outputs.start - group * group_dim, 0)
        high = min(outputs.stop - group * group_dim, group_dim)
        if low < high:
            factor = up[low:high, offset : offset + rank]
            if isinstance(block, PackedLatents):
                parts.append(_rebuild_codes(block, factor, block.pieces(ranks)[group]))
            else:
                parts.append(block[..., offset : offset + rank] @ factor.T)
        offset += rank
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _rebuild_codes(packed: PackedLatents, factor: Tensor, pieces: Sequence[tuple[int, int, int]]) -> Tensor:
    """`B x = s (B c - z B 1)` per token and quantisation group: the product sees codes, exact in any float format."""
    precise = torch.promote_types(factor.dtype, torch.float32)
    shifts = packed.shifts()
    total, column = None, 0
    for index, offset, width in pieces:
        part = factor[:, column : column + width]
        product = (packed.centred(factor.dtype, offset, width) @ part.T).to(precise)
        if shifts is not None:
            product = product - shifts[..., index : index + 1].to(precise) * part.to(precise).sum(dim=1)
        product = product * packed.scales[..., index : index + 1].to(precise)
        total = product if total is None else total + product
        column += width
    return total.to(factor.dtype)
