"""How a compressed model's cache stores latents: the validated settings that are saved with a checkpoint."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch

from palu.core.types import SIDES, Side
from palu.core.validate import is_count, require
from palu.kernels.packing import PLANES
from palu.kernels.quantize import Quantization, quantization_widths, quantize

FULL_BITS = 16
# Tokens of normal latents that errors of codes are measured on.
NOISE_TOKENS = 512
ALLOWED_BITS = (*PLANES, FULL_BITS)
# Settings by the names that they have as flags, where users give them one by one.
FLAGS = {
    "lt_group_size": "group_size",
    "lt_sym": "symmetric",
    "lt_clip_ratio": "clip_ratio",
    "lt_sinks": "sinks",
    "lt_window": "window",
}
# Of each side, for every layer.
LayerBits = Mapping[Side, Sequence[int]]
# Of each side, for every layer, one ratio per quantisation group.
ClipRatios = Mapping[Side, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class QuantizationConfig:
    """How the cache stores latents; 16 bits means as they are, in the model's number format.

    key_bits, value_bits: 2, 3, 4, 8 or 16.
    layer_bits: the same of every layer, instead of both; None if all layers are alike.
    group_size: latents that share a scale inside a head group; None is the whole group.
    symmetric: no zero points.
    clip_ratio: fraction of a group's range that the codes span, in (0, 1]; `auto`: as in `clip_ratios`.
    clip_ratios: what a search on calibration text found, with `auto`; None until it has run.
    sinks, window: how many of the first and of the newest tokens stay as they are.
    """

    key_bits: int = FULL_BITS
    value_bits: int = FULL_BITS
    group_size: int | None = None
    symmetric: bool = False
    clip_ratio: float | Literal["auto"] = 1.0
    clip_ratios: ClipRatios | None = None
    sinks: int = 0
    window: int = 0
    layer_bits: LayerBits | None = None

    def __post_init__(self) -> None:
        allowed = ", ".join(map(str, ALLOWED_BITS))
        for name, bits in (("lt_bits", self.key_bits), ("lt_value_bits", self.value_bits)):
            require(is_count(bits) and bits in ALLOWED_BITS, f"{name} {bits!r} must be one of {allowed}")
        require(
            self.layer_bits is None or _are_layer_bits(self.layer_bits),
            f"'palu' block: 'layer_bits' must hold a list of {allowed} for keys and one for values",
        )
        size = self.group_size
        require(size is None or (is_count(size) and size >= 1), f"lt_group_size {size!r} must be at least 1")
        ratio = self.clip_ratio
        is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        valid = ratio == "auto" or (is_number and 0 < ratio <= 1)
        require(valid, f"lt_clip_ratio {ratio!r} must lie in (0, 1] or be auto")
        for name, count in (("lt_sinks", self.sinks), ("lt_window", self.window)):
            require(is_count(count) and count >= 0, f"{name} {count!r} must be a number of tokens, 0 or more")

    @property
    def is_full(self) -> bool:
        """Whether nothing is quantised."""
        if self.layer_bits is not None:
            return all(bits == FULL_BITS for side in SIDES for bits in self.layer_bits[side])
        return self.key_bits == self.value_bits == FULL_BITS

    @property
    def needs_search(self) -> bool:
        """Whether clip ratios are asked for that have not been searched yet."""
        return self.clip_ratio == "auto" and self.clip_ratios is None and not self.is_full

    def bits(self, side: Side, layer: int) -> int:
        """Bits of one side's latents in one layer."""
        if self.layer_bits is None:
            return self.key_bits if side == "key" else self.value_bits
        return self.layer_bits[side][layer]

    def of(self, ranks: Sequence[int], side: Side, layer: int) -> Quantization | None:
        """How latents of one layer and side, of these group ranks, become codes; None if they stay as they are.

        Raises:
            PaluError: if clip ratios are missing or not one per group.
        """
        bits = self.bits(side, layer)
        if bits == FULL_BITS:
            return None
        widths = quantization_widths(ranks, self.group_size)
        require(
            not self.needs_search, "lt_clip_ratio auto: the ratios have not been searched (palu.search_clip_ratios)"
        )
        ratios = (self.clip_ratio,) * len(widths)
        if self.clip_ratio == "auto":
            by_layer = self.clip_ratios[side]
            ratios = tuple(by_layer[layer]) if layer < len(by_layer) else ()
        require(
            len(ratios) == len(widths),
            f"'palu' block, layer {layer}, {side}: {len(ratios)} clip ratios for {len(widths)} groups",
        )
        return Quantization(bits, widths, self.symmetric, () if set(ratios) == {1.0} else ratios)

    @property
    def choices(self) -> tuple[int, ...]:
        """Bits that a search may choose from."""
        return tuple(PLANES)

    def check_layers(self, num_layers: int) -> None:
        """Refuse bits of layers that are not the model's.

        Raises:
            PaluError: with both numbers.
        """
        found = None if self.layer_bits is None else len(self.layer_bits["key"])
        require(
            found in (None, num_layers), f"'layer_bits' holds {found} layers of each side, the model has {num_layers}"
        )

    def nbytes(self, ranks: Sequence[int], bits: int) -> int:
        """Bytes per token of one layer's side with these group ranks as codes of so many bits."""
        return Quantization(bits, quantization_widths(ranks, self.group_size), self.symmetric).bytes_per_token

    def noise(self, rank: int, bits: int) -> float:
        """Mean squared error of a group's codes over the variance of its latents, if these are normal and alike."""
        clip_ratio = 1.0 if self.clip_ratio == "auto" else float(self.clip_ratio)
        return _noise(bits, quantization_widths([rank], self.group_size), self.symmetric, clip_ratio)

    def changed(self, **settings: Any) -> "QuantizationConfig":
        """The same with other settings; clip ratios that were searched for other codes are dropped, and layers' bits
        where others are given.
        """
        kept = {"sinks", "window"}
        dropped: dict[str, Any] = {}
        if {"key_bits", "value_bits"} & set(settings) and self.layer_bits is not None:
            dropped = {"layer_bits": None, "clip_ratios": None}
        if not all(getattr(self, name) == value for name, value in settings.items() if name not in kept):
            dropped["clip_ratios"] = None
        return replace(self, **dropped, **settings)

    def changed_by_flags(self, flags: Mapping[str, Any], bits_follow: bool = False) -> "QuantizationConfig":
        """The same with what `lt_bits`, `lt_value_bits` and the flags of `FLAGS` ask for; those that are None do not.

        bits_follow: bits are chosen later.

        Raises:
            PaluError: for a value that is not allowed, or a flag that would do nothing.
        """
        bits, value_bits = flags.get("lt_bits"), flags.get("lt_value_bits")
        given = {setting: flags.get(flag) for flag, setting in FLAGS.items()}
        given |= {"key_bits": bits, "value_bits": bits if value_bits is None else value_bits}
        settings = self.changed(**{name: value for name, value in given.items() if value is not None})
        useless = [flag for flag in FLAGS if flags.get(flag) is not None]
        require(
            not (settings.is_full and useless) or bits_follow,
            f"--{''.join(useless[:1])} does nothing without quantised latents; give --lt_bits 2, 3, 4 or 8",
        )
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `layer_bits` only where it is given, which earlier versions do not know."""
        return {name: value for name, value in asdict(self).items() if name != "layer_bits" or value is not None}

    @classmethod
    def from_dict(cls, entries: Any) -> "QuantizationConfig":
        """Parse the JSON entry.

        Raises:
            PaluError: if it is malformed.
        """
        known = {f.name for f in fields(cls)}
        valid = isinstance(entries, Mapping) and set(entries) <= known
        require(valid, f"'palu' block: 'quantization' may hold {', '.join(sorted(known))}")
        ratios = entries.get("clip_ratios")
        require(ratios is None or _are_clip_ratios(ratios), "'palu' block: 'clip_ratios' must hold lists of (0, 1]")
        return cls(**entries)


@functools.cache
def _noise(bits: int, widths: tuple[int, ...], symmetric: bool, clip_ratio: float) -> float:
    """Measured with the quantiser itself."""
    ratios = () if clip_ratio == 1 else (clip_ratio,) * len(widths)
    normal = torch.randn(1, NOISE_TOKENS, sum(widths), generator=torch.Generator().manual_seed(0))
    codes = quantize(normal, Quantization(bits, widths, symmetric, ratios))
    return (codes.dequantized(torch.float32) - normal).square().mean().item()


def _are_layer_bits(bits: Any) -> bool:
    try:
        allowed = all(is_count(each) and each in ALLOWED_BITS for side in SIDES for each in bits[side])
        return set(bits) == set(SIDES) and allowed and 0 < len(bits["key"]) == len(bits["value"])
    except (KeyError, TypeError):
        return False


def _are_clip_ratios(ratios: Any) -> bool:
    try:
        values = [value for side in SIDES for layer in ratios[side] for value in layer]
    except (KeyError, TypeError):
        return False
    return all(isinstance(value, int | float) and 0 < value <= 1 for value in values)
