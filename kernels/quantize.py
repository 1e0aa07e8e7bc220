"""Per-token, per-group quantisation of latents, and the packed tensor that a cache holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palu.kernels.packing import pack, packed_width, unpack

# Scales below this would be subnormal in fp16 and lose their precision.
SMALLEST_SCALE = 2.0**-14
# Keeps zero points within fp16 where a group's range is tiny beside its magnitude.
LARGEST_ZERO_POINT = 30000.0


@dataclass(frozen=True)
class Quantization:
    """How latents become codes.

    bits: 2, 3, 4 or 8 per code.
    widths: codes that share a scale and a zero point, in order; they add up to the latents' width.
    symmetric: a fixed zero point in the middle of the codes instead of a stored one.
    clip_ratios: fraction of each group's range that the codes span, one per group.
    """

    bits: int
    widths: tuple[int, ...]
    symmetric: bool = False
    clip_ratios: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Latents per token."""
        return sum(self.widths)

    @property
    def bytes_per_token(self) -> int:
        """Codes, scales and, if asymmetric, zero points."""
        parameters = len(self.widths) * (1 if self.symmetric else 2)
        return packed_width(self.width, self.bits) + 2 * parameters

    def group_clip_ratios(self) -> tuple[float, ...]:
        """One ratio per group, 1 where none is given."""
        return self.clip_ratios or (1.0,) * len(self.widths)


@dataclass(frozen=True)
class PackedLatents:
    """Latents as codes: `x = scale * (code - zero)` per token and group.

    codes: uint8 [batch, length, packed_width]; scales: fp16 [batch, length, groups]; zeros: the same, or None if
    symmetric.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    quantization: Quantization

    @property
    def shape(self) -> torch.Size:
        """[batch, length, width], as of the latents."""
        return torch.Size((*self.codes.shape[:2], self.quantization.width))

    def narrow(self, dim: int, start: int, length: int) -> "PackedLatents":
        """The tokens start .. start + length, as views; like `Tensor.narrow`, along dimension 1 only."""
        if dim != 1:
            raise ValueError(f"packed latents can be narrowed along their tokens (1) only, not {dim}")
        zeros = None if self.zeros is None else self.zeros.narrow(1, start, length)
        return PackedLatents(
            self.codes.narrow(1, start, length), self.scales.narrow(1, start, length), zeros, self.quantization
        )

    def pieces(self, ranks: Sequence[int]) -> list[list[tuple[int, int, int]]]:
        """For every head group its quantisation groups as (index, first latent, width).

        Raises:
            ValueError: if a quantisation group crosses the border between two head groups.
        """
        result, index, offset = [], 0, 0
        for rank in ranks:
            end, inside = offset + rank, []
            while offset < end:
                width = self.quantization.widths[index]
                inside.append((index, offset, width))
                index, offset = index + 1, offset + width
            if offset != end:
                raise ValueError(f"quantisation groups {self.quantization.widths} do not fit the ranks {list(ranks)}")
            result.append(inside)
        return result

    def unpacked(self) -> Tensor:
        """uint8 codes [batch, length, width]."""
        return unpack(self.codes, self.quantization.width, self.quantization.bits)

    def zero_points(self) -> Tensor:
        """fp16 [batch, length, groups]; the middle of the codes if symmetric."""
        if self.zeros is not None:
            return self.zeros
        return torch.full_like(self.scales, 2.0 ** (self.quantization.bits - 1))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Latents [batch, length, width] with the rounding of their codes."""
        widths = torch.tensor(self.quantization.widths, device=self.codes.device)
        scales = self.scales.float().repeat_interleave(widths, dim=-1)
        zeros = self.zero_points().float().repeat_interleave(widths, dim=-1)
        return (scales * (self.unpacked().float() - zeros)).to(dtype)


def quantize(latents: Tensor, quantization: Quantization) -> PackedLatents:
    """Round latents [batch, length, width] to packed codes; any floating dtype, computed in float32.

    Scale and zero point are rounded to fp16 first and the codes chosen for the rounded ones. A group that is constant
    in a token is stored up to fp16 precision.
    """
    groups = latents.float().split(list(quantization.widths), dim=-1)
    encode = _encode_symmetric if quantization.symmetric else _encode_asymmetric
    parts = [
        encode(group, quantization.bits, clip)
        for group, clip in zip(groups, quantization.group_clip_ratios(), strict=True)
    ]
    codes = torch.cat([part[0] for part in parts], dim=-1)
    scales = torch.cat([part[1] for part in parts], dim=-1)
    zeros = None if quantization.symmetric else torch.cat([part[2] for part in parts], dim=-1)
    return PackedLatents(pack(codes, quantization.bits), scales, zeros, quantization)


def _encode_asymmetric(group: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    top = 2**bits - 1
    low, high = group.amin(-1, keepdim=True) * clip, group.amax(-1, keepdim=True) * clip
    magnitude = group.abs().amax(-1, keepdim=True)
    scale = _half(torch.maximum((high - low) / top, magnitude / LARGEST_ZERO_POINT))
    # The smallest value has code 0; a group that is constant is carried by its zero point.
    zero = (-low / scale.float()).half()
    codes = (group / scale.float() + zero.float()).round().clamp(0, top)
    return codes.to(torch.uint8), scale, zero


def _encode_symmetric(group: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, None]:
    middle = 2 ** (bits - 1)
    scale = _half(group.abs().amax(-1, keepdim=True) * clip / (middle - 0.5))
    codes = (group / scale.float() + middle).round().clamp(0, 2 * middle - 1)
    return codes.to(torch.uint8), scale, None


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(SMALLEST_SCALE, 60000).half()


def quantization_widths(ranks: Sequence[int], group_size: int | None) -> tuple[int, ...]:
    """Widths of the quantisation groups: whole head groups, or pieces of `group_size` inside each."""
    if group_size is None:
        return tuple(ranks)
    return tuple(min(group_size, rank - start) for rank in ranks for start in range(0, rank, group_size))
