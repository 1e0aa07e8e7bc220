"""Per-token, per-group quantisation of latents, and the packed tensor that a cache holds."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palu.kernels.apart import made_apart
from palu.kernels.availability import uses_kernels
from palu.kernels.packing import pack, packed_width, unpack

# Scales below this would be subnormal in fp16 and lose their precision.
SMALLEST_SCALE = 2.0**-14
# Keeps zero points within fp16 where a group's range is tiny beside its magnitude.
LARGEST_ZERO = 30000.0
# Zero points of so many bits and more are whole numbers, with a half of a scale at most between them and the range's
# ends; fewer codes cannot spare that. As large as this at most, so that fp16 holds 1024 more.
WHOLE_ZEROS, LARGEST_WHOLE_ZERO = 4, 1023.0


@dataclass(frozen=True)
class Quantization:
    """How latents become codes.

    bits: 2, 3, 4 or 8 per code.
    widths: codes that share a scale and a zero point, in order; they add up to the latents' width.
    symmetric: a fixed zero point in the middle of the codes instead of a stored one.
    clip_ratios: fraction of each group's range, about its centre, that the codes span; one per group, or none for 1.
    fine_zeros: zero points keep their fractions at any number of bits, as those of caches of keys and values do.
    """

    bits: int
    widths: tuple[int, ...]
    symmetric: bool = False
    clip_ratios: tuple[float, ...] = ()
    fine_zeros: bool = False

    @property
    def width(self) -> int:
        """Latents per token."""
        return sum(self.widths)

    @property
    def middle(self) -> int:
        """The code in the middle of the range; where symmetric, that of zero."""
        return 2 ** (self.bits - 1)

    @property
    def whole_zeros(self) -> bool:
        """Whether zero points are whole numbers: codes less zero points are, then, exact in fp16."""
        return self.bits >= WHOLE_ZEROS and not self.fine_zeros

    @property
    def largest_zero(self) -> float:
        """What zero points are at most."""
        return LARGEST_WHOLE_ZERO if self.whole_zeros else LARGEST_ZERO

    @property
    def packed_width(self) -> int:
        """Bytes of a token's codes."""
        return packed_width(self.width, self.bits)

    @property
    def parameter_count(self) -> int:
        """Scales and, if asymmetric, zero points of a token."""
        return len(self.widths) * (1 if self.symmetric else 2)

    @property
    def bytes_per_token(self) -> int:
        """Codes, scales and zero points."""
        return self.packed_width + 2 * self.parameter_count

    def scales_whole(self, ranks: Sequence[int]) -> bool:
        """Whether every head group of such ranks has one scale."""
        return self.widths == tuple(ranks)

    def split(self, sizes: Sequence[int]) -> list["Quantization"]:
        """The same of consecutive parts of the latents, `sizes` wide.

        Raises:
            ValueError: if a group would be cut.
        """
        parts, first = [], 0
        for size in sizes:
            last, width = first, 0
            while width < size:
                width, last = width + self.widths[last], last + 1
            if width != size:
                raise ValueError(f"quantisation groups {self.widths} cannot be split into parts {list(sizes)}")
            clip_ratios = self.clip_ratios[first:last]
            parts.append(replace(self, widths=self.widths[first:last], clip_ratios=clip_ratios))
            first = last
        return parts

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Groups side by side of equal width, as (first group, number of groups, width)."""
        first = 0
        for width, run in itertools.groupby(self.widths):
            count = len(list(run))
            yield first, count, width
            first += count


@dataclass(frozen=True)
class PackedLatents:
    """Latents as codes: `x = scale * (code - zero)` per token and group.

    codes: uint8 [batch, length, packed_width]; scales: fp16 [batch, length, groups]; zeros: the same, or None if
    symmetric. A group's scale and zero point lie side by side, so that one load of 32 bits fetches both.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    quantization: Quantization

    @classmethod
    def of(cls, codes: Tensor, parameters: Tensor, quantization: Quantization) -> "PackedLatents":
        """From codes and fp16 parameters: scales, or scales and zero points in turns."""
        if quantization.symmetric:
            return cls(codes, parameters, None, quantization)
        return cls(codes, *parameters.unflatten(-1, (-1, 2)).unbind(-1), quantization)

    @property
    def parameters(self) -> Tensor:
        """What `of` takes beside the codes."""
        if self.zeros is None:
            return self.scales
        return torch.stack([self.scales, self.zeros], dim=-1).flatten(-2)

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

    def unpacked(self, start: int = 0, count: int | None = None) -> Tensor:
        """uint8 codes [batch, length, count] of all latents, or of `count` of them from `start`."""
        return unpack(self.codes, self.quantization.width, self.quantization.bits, start, count)

    def centred(self, dtype: torch.dtype, start: int = 0, count: int | None = None) -> Tensor:
        """`code - middle`, exact in every floating dtype: `x = scale * (centred - shift)`.

        Products of centred codes cancel less against the zero point's than those of the codes themselves.
        """
        return self.unpacked(start, count).to(dtype) - self.quantization.middle

    def shifts(self) -> Tensor | None:
        """`zero - middle`, float32 [batch, length, groups]; None if symmetric, where it is zero."""
        return None if self.zeros is None else self.zeros.float() - self.quantization.middle

    def dequantized(self, dtype: torch.dtype, start: int = 0, count: int | None = None) -> Tensor:
        """Latents [batch, length, width] with the rounding of their codes, or `count` of them from `start`.

        `start` and `count` have to end at borders of quantisation groups. One Triton launch on a GPU.
        """
        count = self.quantization.width - start if count is None else count
        borders = list(itertools.accumulate(self.quantization.widths, initial=0))
        first, last = borders.index(start), borders.index(start + count)
        has_gradient = torch.is_grad_enabled() and self.scales.requires_grad
        takes = not (torch.compiler.is_compiling() or has_gradient or dtype == torch.float64)
        if takes and uses_kernels(self.codes):
            # Here, as it imports this module.
            from palu.kernels.quantization.launch import launch_dequantized

            return launch_dequantized(self, dtype, range(first, last))
        latents = self.centred(torch.float32, start, count).split(self.quantization.widths[first:last], dim=-1)
        shifts = self.shifts()
        parts = []
        for group, part in enumerate(latents, start=first):
            shifted = part if shifts is None else part - shifts[..., group : group + 1]
            parts.append((shifted * self.scales[..., group : group + 1].float()).to(dtype))
        return torch.cat(parts, dim=-1)


def quantize(latents: Tensor, quantization: Quantization) -> PackedLatents:
    """Round latents [batch, length, width] to packed codes; any floating dtype, computed in float32.

    Scale and zero point are rounded to fp16 first and the codes chosen for the rounded ones. A group that is constant
    in a token is stored up to fp16 precision. One Triton launch on a GPU, the definition below elsewhere.
    """
    return PackedLatents.of(*encode(latents, quantization), quantization)


def encode(latents: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """As `quantize`, the tensors that a cache holds: what `PackedLatents.of` takes.

    Where gradients are asked for a compiler sees the definition, whose rounding of scales it may leave out.
    """
    has_gradient = torch.is_grad_enabled() and latents.requires_grad
    if torch.compiler.is_compiling() and not has_gradient:
        # Here, as it imports this module.
        from palu.kernels.quantization.compiled import compiled_encode

        return compiled_encode(latents, quantization)
    if uses_kernels(latents):
        # Here, so that machines without a GPU need no Triton.
        from palu.kernels.quantization.launch import can_take, launch_encode

        if can_take(latents, quantization):
            return launch_encode(latents, quantization)
    return reference_encode(latents, quantization)


def encode_into(
    codes: Tensor, parameters: Tensor, latents: Tensor, quantization: Quantization, slots: Tensor | None = None
) -> None:
    """As `encode`, of new tokens' latents [batch, new, width] to where a cache holds them.

    codes: uint8 [batch, new, packed_width]; parameters: fp16 [batch, new, groups or 2 * groups]; views, which are
    written in place; with slots [new] (int64) both have more tokens, of which the new ones are these. One Triton launch
    on a GPU; compiled, `encode` and two copies.
    """
    if uses_kernels(latents) and not torch.compiler.is_compiling():
        from palu.kernels.quantization.launch import can_take, launch_encode_into

        if can_take(latents, quantization):
            launch_encode_into(codes, parameters, latents, quantization, slots)
            return
    for storage, tensor in zip((codes, parameters), encode(latents, quantization), strict=True):
        if slots is None:
            storage.copy_(tensor)
        else:
            storage.index_copy_(1, slots, tensor)


def reference_encode(latents: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch."""
    clips = clip_tensor(quantization, latents.device) if quantization.clip_ratios else None
    of_groups = _encode_symmetric if quantization.symmetric else _encode_asymmetric
    codes, scales, zeros = [], [], []
    offset = 0
    for first, count, width in quantization.runs():
        groups = latents[..., offset : offset + count * width].float().unflatten(-1, (count, width))
        clip = 1.0 if clips is None else clips[first : first + count, None]
        code, scale, zero = of_groups(groups, quantization, clip)
        codes.append(code.flatten(-2))
        scales.append(scale[..., 0])
        zeros.append(None if zero is None else zero[..., 0])
        offset += count * width
    packed, parameters = pack(torch.cat(codes, dim=-1), quantization.bits), torch.cat(scales, dim=-1)
    if not quantization.symmetric:
        parameters = torch.stack([parameters, torch.cat(zeros, dim=-1)], dim=-1).flatten(-2)
    return packed, parameters


@functools.lru_cache(maxsize=1024)
def clip_tensor(quantization: Quantization, device: torch.device) -> Tensor:
    """The clip ratios on a device, made once: a CUDA graph cannot copy them there."""
    return made_apart(device, lambda: torch.tensor(quantization.clip_ratios, device=device))


def _encode_asymmetric(
    groups: Tensor, quantization: Quantization, clip: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    top = 2**quantization.bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    magnitude = torch.maximum(low.abs(), high.abs())
    span = (high - low) * clip
    scale = _half(torch.maximum(span / top, magnitude / quantization.largest_zero))
    # The lower end of what is left of the range has code 0; a group that is constant is carried by its zero point.
    zero = (span - low - high) / 2 / scale.float()
    zero = (zero.round() if quantization.whole_zeros else zero).half()
    codes = (groups / scale.float() + zero.float()).round().clamp(0, top)
    return codes.to(torch.uint8), scale, zero


def _encode_symmetric(groups: Tensor, quantization: Quantization, clip: Tensor | float) -> tuple[Tensor, Tensor, None]:
    middle = quantization.middle
    scale = _half(groups.abs().amax(-1, keepdim=True) * clip / (middle - 0.5))
    codes = (groups / scale.float() + middle).round().clamp(0, 2 * middle - 1)
    return codes.to(torch.uint8), scale, None


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(SMALLEST_SCALE, 60000).half()


def quantization_widths(ranks: Sequence[int], group_size: int | None) -> tuple[int, ...]:
    """Widths of the quantisation groups: whole head groups, or pieces of `group_size` inside each."""
    if group_size is None:
        return tuple(ranks)
    return tuple(min(group_size, rank - start) for rank in ranks for start in range(0, rank, group_size))
