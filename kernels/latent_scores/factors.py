"""What key latents are multiplied with, in the order in which packed codes come out of their words or units."""

import functools
import math
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from palu.kernels.apart import made_apart
from palu.kernels.latents import LatentProjection, version_of
from palu.kernels.packing import PLANES

# Latents that a program multiplies at a time.
PART = 128


def padded_rank(ranks: tuple[int, ...]) -> int:
    """Latents that a program reads of each group: a power of two up to PART, beyond that a multiple of it."""
    largest = max(16, max(ranks))
    return 1 << (largest - 1).bit_length() if largest <= PART else -(-largest // PART) * PART


def latent_order(columns: int, bits: int) -> list[int]:
    """Which of `columns` latents stands in each column of what `palu.kernels.codes.load_latents` returns."""
    per_word = 16 if bits == 3 else 32 // bits
    words = columns // per_word
    firsts = [pair % words * per_word + pair // words for pair in range(columns // 2)]
    return [latent for first in firsts for latent in (first, first + per_word // 2)]


def unit_order(columns: int, bits: int) -> list[int]:
    """Which of `columns` latents stands in each column of what units of 16 bits become: a field after another.

    Of 3 bits units of the low plane.
    """
    fields = 16 // PLANES[bits][0]
    return [unit * fields + field for field in range(fields) for unit in range(columns // fields)]


def word_order(columns: int, bits: int) -> list[int]:
    """`latent_order`, PART by PART."""
    part = min(columns, PART)
    return [start + latent for start in range(0, columns, part) for latent in latent_order(part, bits)]


Order = Callable[[int, int], list[int]]
_ordered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def ordered_factor(key: LatentProjection, padded: int, bits: int, dtype: torch.dtype, order: Order) -> Tensor:
    """The up factor in an order of codes of `bits` bits, [group_dim, groups * padded], zero where there is no latent.

    Made once for an order and kept as long as the factor, until that is written to or gets other memory; writing to its
    `.data` goes unnoticed.
    """
    columns = _columns(padded, bits, order, key.up.device)
    return _kept(key, order, (padded, bits, dtype), lambda: _in_order(key, padded, columns).to(dtype))


def bounded_factor(
    key: LatentProjection, padded: int, bits: int, dtype: torch.dtype, order: Order, most: float, least: float
) -> tuple[Tensor, float]:
    """As `ordered_factor`, divided by a power of two, so that no row's numbers add up to more than `most`; the power.

    least: the power at least; of a factor that is not finite it is infinite. Made before a step is captured in a CUDA
    graph, which cannot wait for the power.
    """
    columns = _columns(padded, bits, order, key.up.device)

    def make() -> tuple[Tensor, float]:
        factor = _in_order(key, padded, columns).float()
        largest = factor.abs().unflatten(1, (-1, padded)).sum(-1).amax().clamp(min=1e-20).item()
        power = max(least, 2.0 ** math.ceil(math.log2(largest / most))) if math.isfinite(largest) else math.inf
        return (factor / power).to(dtype), power

    return _kept(key, (order, most, least), (padded, bits, dtype), make)


def _in_order(key: LatentProjection, padded: int, columns: Tensor) -> Tensor:
    groups = key.up.detach().clone().split(list(key.ranks), dim=1)
    return torch.cat([torch.nn.functional.pad(each, (0, padded - each.shape[1]))[:, columns] for each in groups], dim=1)


Made = TypeVar("Made")


def _kept(key: LatentProjection, name: Hashable, kind: tuple[object, ...], make: Callable[[], Made]) -> Made:
    """What was made of the factor under a name, or make it, if it is of another kind or of another factor."""
    kept = _ordered.setdefault(key.up, {})
    # Moving a module leaves its parameters the objects that they were, and their versions.
    memory = (key.up.data_ptr(), key.up.device, key.up.dtype, version_of(key.up))
    entry = (*kind, tuple(key.ranks), *memory)
    if kept.get(name, (None,))[0] != entry:
        kept[name] = (entry, made_apart(key.up.device, make))
    return kept[name][1]


def ordered_query(query: Tensor, padded: int, bits: int) -> Tensor:
    """An absorbed query [rows, heads, largest rank] in the order of the codes, [rows, heads, padded]."""
    columns = _columns(padded, bits, word_order, query.device)
    return torch.nn.functional.pad(query, (0, padded - query.shape[-1]))[..., columns]


@functools.lru_cache(maxsize=64)
def _columns(padded: int, bits: int, order: Order, device: torch.device) -> Tensor:
    return made_apart(device, lambda: torch.tensor(order(padded, bits), device=device))
