"""Launches the quantisation kernels: what they can take, their grids, their buffers."""

import torch
from torch import Tensor

from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latent_scores.layout import side_of
from palu.kernels.packing import packed_width
from palu.kernels.quantization.kernel import dequantize_kernel, quantize_kernel
from palu.kernels.quantize import SMALLEST_SCALE, PackedLatents, Quantization, clip_tensor
from palu.kernels.relaunch import relaunch

# Groups of such multiples begin at whole bytes of every plane; wider ones than the largest do not fit in registers.
WIDTH_MULTIPLE, LARGEST_WIDTH = 16, 8192
# Codes that a program makes numbers of at a time, and of one token at most.
CODES, COLUMNS = 4096, 1024


def can_take(latents: Tensor, quantization: Quantization) -> bool:
    """Whether the kernel can compute this call."""
    fits = all(width % WIDTH_MULTIPLE == 0 and width <= LARGEST_WIDTH for width in quantization.widths)
    # Others are the definition's to refuse.
    fits = fits and latents.shape[-1] == quantization.width
    return fits and not (torch.is_grad_enabled() and latents.requires_grad) and latents.dtype != torch.float64


def launch_encode(latents: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """As `palu.kernels.quantize.encode`, in one launch."""
    batch, length, _ = latents.shape
    codes = latents.new_empty(batch, length, quantization.packed_width, dtype=torch.uint8)
    parameters = latents.new_empty(batch, length, quantization.parameter_count, dtype=torch.float16)
    launch_encode_into(codes, parameters, latents, quantization)
    return codes, parameters


def launch_encode_into(
    codes: Tensor, parameters: Tensor, latents: Tensor, quantization: Quantization, slots: Tensor | None = None
) -> None:
    """As `palu.kernels.quantize.encode_into`, in one launch."""
    batch, length, width = latents.shape
    if batch * length == 0:
        return
    rows, bits = latents.reshape(batch * length, width), quantization.bits
    clips = clip_tensor(quantization, latents.device) if quantization.clip_ratios else rows
    relaunch(
        quantize_kernel, (batch * length, len(quantization.widths)),
        rows, clips, codes, parameters, rows if slots is None else slots,
        *side_of(quantization.widths, bits, latents.device),
        length, rows.stride(0), *codes.stride()[:2], *parameters.stride()[:2],
        SMALLEST_SCALE, quantization.largest_zero,
        BITS=bits, PIECES=8 if bits == 3 else 8 // bits, SYMMETRIC=quantization.symmetric,
        WHOLE_ZEROS=quantization.whole_zeros, HAS_CLIPS=bool(quantization.clip_ratios), HAS_SLOTS=slots is not None,
        BLOCK=next_power_of_2(max(quantization.widths)),
    )  # fmt: skip


def launch_dequantized(packed: PackedLatents, dtype: torch.dtype, groups: range) -> Tensor:
    """As `PackedLatents.dequantized`, of some neighbouring quantisation groups."""
    quantization, (batch, length, _) = packed.quantization, packed.shape
    widths, bits = quantization.widths, quantization.bits
    numbers = packed.codes.new_empty(batch, length, sum(widths[groups.start : groups.stop]), dtype=dtype)
    if numbers.numel() == 0:
        return numbers
    side = side_of(widths, bits, packed.codes.device)
    block = min(COLUMNS, next_power_of_2(max(widths)))
    tokens = max(1, CODES // block)
    zeros = packed.scales if packed.zeros is None else packed.zeros
    relaunch(
        dequantize_kernel, (cdiv(batch * length, tokens), len(groups)),
        packed.codes, packed.scales, zeros, numbers, side.rank, side.offset,
        batch * length, length, groups.start, sum(widths[: groups.start]), packed_width(quantization.width, 2),
        *packed.codes.stride()[:2], *packed.scales.stride(), *zeros.stride(), numbers.stride(1),
        BITS=bits, SYMMETRIC=packed.zeros is None, TOKENS=tokens, BLOCK=block,
    )  # fmt: skip
    return numbers
