"""What new tokens may attend to, in the forms that attention implementations take."""

import torch
from torch import Tensor
from torch.nn import functional as F


def decode_mask(
    attention_mask: Tensor | None, query: Tensor, length: int, filled: int | Tensor, sliding_window: int | None
) -> Tensor | None:
    """A mask [batch or 1, 1 or num_heads, queries, length] from what the attention implementations are given.

    Without a 4D mask the newest queries of the `filled` slots are the queries themselves, each sees what came before
    it, and a 2D mask (flash attention's convention) hides padding.

    Args:
        query: [batch, num_heads, queries, head_dim].
        length: slots of the cache.
    """
    queries = query.shape[2]
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask[..., :length]
    if attention_mask is None and queries == 1 and isinstance(filled, int) and filled == length:
        return None
    slots = torch.arange(length, device=query.device)
    own = torch.arange(queries, device=query.device) + (filled - queries)
    behind = own[:, None] - slots
    visible = behind >= 0
    if sliding_window is not None:
        visible = visible & (behind < sliding_window)
    if attention_mask is None:
        return visible[None, None]
    padding = attention_mask[:, -length:].bool()
    padding = F.pad(padding, (0, length - padding.shape[1]))
    return visible[None, None] & padding[:, None, None]


def by_heads(mask: Tensor | None, num_heads: int) -> Tensor | None:
    """A mask of consecutive equal groups of heads, [batch, groups, ...], for every head; one of all stays one."""
    if mask is None or mask.shape[1] == 1:
        return mask
    return mask.repeat_interleave(num_heads // mask.shape[1], dim=1)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero where a boolean mask is true, the smallest number elsewhere, as eager attention wants it."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
