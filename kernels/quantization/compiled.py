"""Quantisation as torch.compile sees it: one call, as compilers drop the rounding of scales to fp16 and back."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from palu.kernels.packing import packed_width
from palu.kernels.quantize import Quantization, encode

# Code that travels with a checkpoint may be loaded beside the installed one.
NAMESPACE = re.sub(r"\W", "_", __name__)


def compiled_encode(latents: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """As `palu.kernels.quantize.encode`, in one call of tensors and numbers."""
    return _encode(
        latents, quantization.bits, list(quantization.widths), quantization.symmetric, list(quantization.clip_ratios)
    )


@torch.library.custom_op(f"{NAMESPACE}::encode", mutates_args=())
def _encode(
    latents: Tensor, bits: int, widths: Sequence[int], symmetric: bool, clip_ratios: Sequence[float]
) -> tuple[Tensor, Tensor]:
    return encode(latents, Quantization(bits, tuple(widths), symmetric, tuple(clip_ratios)))


@_encode.register_fake
def _(
    latents: Tensor, bits: int, widths: Sequence[int], symmetric: bool, clip_ratios: Sequence[float]
) -> tuple[Tensor, Tensor]:
    batch, length, width = latents.shape
    # A number that differs between calls is a symbol here.
    codes = latents.new_empty(batch, length, packed_width(width, int(bits)), dtype=torch.uint8)
    count = len(widths) * (1 if symmetric else 2)
    return codes, latents.new_empty(batch, length, count, dtype=torch.float16)
