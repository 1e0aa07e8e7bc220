"""Quantisation as torch.compile sees it: one call, as compilers drop the rounding of scales to fp16 and back."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from palu.kernels.quantize import Quantization, encode

# Code that travels with a checkpoint may be loaded beside the installed one.
NAMESPACE = re.sub(r"\W", "_", __name__)


def compiled_encode(latents: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """As `palu.kernels.quantize.encode`, in one call of tensors and numbers."""
    kind = quantization
    return _encode(latents, kind.bits, list(kind.widths), kind.symmetric, list(kind.clip_ratios), kind.fine_zeros)


@torch.library.custom_op(f"{NAMESPACE}::encode", mutates_args=())
def _encode(
    latents: Tensor, bits: int, widths: Sequence[int], symmetric: bool, clip_ratios: Sequence[float], fine_zeros: bool
) -> tuple[Tensor, Tensor]:
    return encode(latents, Quantization(bits, tuple(widths), symmetric, tuple(clip_ratios), fine_zeros))


@_encode.register_fake
def _(
    latents: Tensor, bits: int, widths: Sequence[int], symmetric: bool, clip_ratios: Sequence[float], fine_zeros: bool
) -> tuple[Tensor, Tensor]:
    batch, length, _ = latents.shape
    # A number that differs between calls is a symbol here.
    kind = Quantization(int(bits), tuple(int(width) for width in widths), symmetric)
    codes = latents.new_empty(batch, length, kind.packed_width, dtype=torch.uint8)
    return codes, latents.new_empty(batch, length, kind.parameter_count, dtype=torch.float16)
