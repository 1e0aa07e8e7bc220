"""Latents back to full keys or values: the plain PyTorch definition."""

from collections.abc import Sequence

import torch
from torch import Tensor


def reconstruct(latents: Tensor, up: Tensor, ranks: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """Rebuild a projection's output from its groups' latents.

    Args:
        latents: [batch, length, sum(ranks)], groups side by side.
        up: [group_dim, sum(ranks)], the groups' up factors side by side.
        ranks: rank of every group.
        bias: [groups * group_dim] or None.

    Returns:
        [batch, length, groups * group_dim], dtype of `latents`.
    """
    parts = zip(latents.split(list(ranks), dim=-1), up.split(list(ranks), dim=-1), strict=True)
    full = torch.cat([latent @ factor.T for latent, factor in parts], dim=-1)
    return full if bias is None else full + bias
