"""Entry point of the op: on a GPU codes become numbers before they meet the factors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palu.kernels.availability import uses_kernels
from palu.kernels.latents import Latents, dense, stretches
from palu.kernels.quantize import PackedLatents
from palu.kernels.reconstruct.reference import reconstruct as reference_reconstruct


def reconstruct(
    latents: Latents,
    up: Tensor,
    ranks: Sequence[int],
    bias: Tensor | None = None,
    span: tuple[int, int] | None = None,
) -> Tensor:
    """Rebuild a projection's output, or a part of it; arguments and result as in the reference.

    There products are scaled, in several passes over outputs, which are far more than latents. With kernels the codes
    of the groups that are wanted become numbers of the factors' dtype in one launch, rounded as a cache without codes
    holds them.
    """
    packed = any(isinstance(part, PackedLatents) for part in stretches(latents))
    if not packed or not uses_kernels(up) or torch.compiler.is_compiling():
        return reference_reconstruct(latents, up, ranks, bias, span)
    group_dim = up.shape[0]
    first, last = (0, group_dim * len(ranks)) if span is None else span
    groups = slice(first // group_dim, (last - 1) // group_dim + 1)
    start, wanted = sum(ranks[: groups.start]), ranks[groups]
    before = groups.start * group_dim
    return reference_reconstruct(
        dense(latents, up.dtype, start, sum(wanted)),
        up[:, start : start + sum(wanted)],
        wanted,
        None if bias is None else bias[before : groups.stop * group_dim],
        (first - before, last - before),
    )
