"""Latents back to full keys or values: the plain PyTorch definition."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palu.kernels.quantize import PackedLatents


def reconstruct(
    latents: Tensor | PackedLatents, up: Tensor, ranks: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """Rebuild a projection's output from its groups' latents.

    Args:
        latents: [batch, length, sum(ranks)], groups side by side; packed latents are multiplied as codes.
        up: [group_dim, sum(ranks)], the groups' up factors side by side.
        ranks: rank of every group.
        bias: [groups * group_dim] or None.

    Returns:
        [batch, length, groups * group_dim], dtype of `up`.
    """
    if isinstance(latents, PackedLatents):
        full = _reconstruct_codes(latents, up, ranks)
        return full if bias is None else full + bias
    parts = zip(latents.split(list(ranks), dim=-1), up.split(list(ranks), dim=-1), strict=True)
    full = torch.cat([latent @ factor.T for latent, factor in parts], dim=-1)
    return full if bias is None else full + bias


def _reconstruct_codes(packed: PackedLatents, up: Tensor, ranks: Sequence[int]) -> Tensor:
    """`B x = s (B c - z B 1)` per token and quantisation group: the product sees codes, exact in any float format."""
    codes = packed.unpacked().to(up.dtype)
    zeros = packed.zero_points()
    groups = []
    for pieces in packed.pieces(ranks):
        group = 0
        for index, offset, width in pieces:
            factor = up[:, offset : offset + width]
            zero = zeros[..., index : index + 1].to(up.dtype)
            product = codes[..., offset : offset + width] @ factor.T - zero * factor.sum(dim=1)
            group = group + product * packed.scales[..., index : index + 1].to(up.dtype)
        groups.append(group)
    return torch.cat(groups, dim=-1)
