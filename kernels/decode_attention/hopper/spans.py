"""Which rows' visible tokens stand without gaps, so that windows of positions can be laid over them."""

import torch
from torch import Tensor

from palu.kernels.integers import cdiv
from palu.kernels.latent_scores.tiles import GAPS as KERNEL_GAPS
from palu.kernels.latent_scores.tiles import HIDING as KERNEL_HIDING
from palu.kernels.rotation import Rotation

GAPS, HIDING = KERNEL_GAPS.value, KERNEL_HIDING.value


def spans_of(
    rotation: Rotation, mask: Tensor | None, start: int, length: int, queries: int, tile: int
) -> Tensor:  # fmt: skip
    """Of every row its lead, and the tiles from the first to the end of what it sees: int32 [rows or 1, 3].

    The lead is the position of token `start` if all visible ones of `length` from it on follow each other, else GAPS.
    Made once for all layers.

    Args:
        mask: [rows or 1, tokens] or None; queries: rows that share a row of positions.
    """
    positions = rotation.positions[:, start : start + length]
    visible = None if mask is None else mask[:, start : start + length]
    key = ("spans", start, length, queries, tile)
    return rotation.seen(key, mask, lambda: (_spans(positions, visible, length, queries, tile),))[0]


def _spans(positions: Tensor, mask: Tensor | None, length: int, queries: int, tile: int) -> Tensor:
    slot = torch.arange(length, device=positions.device)
    lead = positions - slot
    if mask is None:
        lowest, highest = lead.aminmax(dim=1)
        first, end = torch.zeros_like(lowest), torch.full_like(lowest, length)
    else:
        seen = mask if mask.dtype == torch.bool else mask > HIDING
        if positions.shape[0] > 1:
            lead = lead.repeat_interleave(queries, dim=0)
        lowest = torch.where(seen, lead, GAPS).amin(1)
        highest = torch.where(seen, lead, -GAPS).amax(1)
        first = torch.where(seen, slot, length).amin(1).expand_as(lowest)
        end = torch.where(seen, slot + 1, 0).amax(1).expand_as(lowest)
    # A row that sees nothing counts as one with gaps.
    lead = torch.where(lowest == highest, lowest, GAPS)
    spans = torch.stack([lead, first // tile, cdiv(end, tile)], dim=1).to(torch.int32)
    return spans.repeat_interleave(queries, dim=0) if mask is None and positions.shape[0] > 1 else spans
