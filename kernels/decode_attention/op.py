"""Entry point of the op: shape checks and the choice of implementation."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from palu.kernels.availability import HAS_TRITON, uses_kernels
from palu.kernels.decode_attention.compiled import compiled_decode_attention, travels
from palu.kernels.decode_attention.reference import decode_attention as reference_decode_attention
from palu.kernels.latents import LatentProjection, Latents
from palu.kernels.rotation import Rotation

if torch.cuda.is_available() and not HAS_TRITON:
    warnings.warn("Triton is not installed: decoding over latents runs in slow plain PyTorch", stacklevel=2)


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
    with_probabilities: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a few query tokens over latents; arguments and result as in the reference.

    Triton kernels compute it on a GPU, the reference elsewhere, without Triton, where `PALU_FORCE_REFERENCE` is set,
    and where probabilities are wanted; otherwise those are None. To torch.compile the kernels are one call.

    Raises:
        ValueError: if the latents' widths do not match the ranks, or the lengths differ.
    """
    for name, latents, side in (("key", key_latents, key), ("value", value_latents, value)):
        if latents.shape[-1] != sum(side.ranks):
            raise ValueError(
                f"{name} latents are {latents.shape[-1]} wide, the ranks {list(side.ranks)} need a sum of that"
            )
    if key_latents.shape[1] != value_latents.shape[1]:
        raise ValueError(f"{key_latents.shape[1]} key latents but {value_latents.shape[1]} value latents")
    if uses_kernels(query) and torch.compiler.is_compiling():
        call = (key_latents, value_latents, key, value)
        together = rotation is None or rotation.groups == 1
        if not with_probabilities and together and travels(*call, key_norm):
            return compiled_decode_attention(query, *call, rotation, mask, scaling, key_norm, head_dim), None
    elif uses_kernels(query):
        # Here, so that machines without a GPU need no Triton.
        from palu.kernels.decode_attention.launch import can_take
        from palu.kernels.decode_attention.launch import decode_attention as launch_decode_attention

        call = (query, key_latents, value_latents, key, value)
        if not with_probabilities and can_take(*call, rotation, mask, key_norm):
            return launch_decode_attention(*call, rotation, mask, scaling, key_norm, head_dim), None
    return reference_decode_attention(
        query, key_latents, value_latents, key, value, rotation, mask, scaling, key_norm, head_dim
    )
