"""What key latents are multiplied with, in the order in which packed codes come out of their words or units."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from palu.kernels.apart import made_apart
from palu.kernels.latents import LatentProjection, version_of

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
    """Which of `columns` latents stands in each column of what units of 16 bits become: a field after another."""
    fields = 16 // bits
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
    kept = _ordered.setdefault(key.up, {})
    # Moving a module leaves its parameters the objects that they were, and their versions.
    memory = (key.up.data_ptr(), key.up.device, key.up.dtype, version_of(key.up))
    entry = (padded, bits, dtype, tuple(key.ranks), *memory)
    if kept.get(order, (None,))[0] != entry:
        columns = _columns(padded, bits, order, key.up.device)

        def make() -> Tensor:
            groups = key.up.detach().clone().split(list(key.ranks), dim=1)
            made = [torch.nn.functional.pad(group, (0, padded - group.shape[1]))[:, columns] for group in groups]
            return torch.cat(made, dim=1).to(dtype)

        kept[order] = (entry, made_apart(key.up.device, make))
    return kept[order][1]


def ordered_query(query: Tensor, padded: int, bits: int) -> Tensor:
    """An absorbed query [rows, heads, largest rank] in the order of the codes, [rows, heads, padded]."""
    columns = _columns(padded, bits, word_order, query.device)
    return torch.nn.functional.pad(query, (0, padded - query.shape[-1]))[..., columns]


@functools.lru_cache(maxsize=64)
def _columns(padded: int, bits: int, order: Order, device: torch.device) -> Tensor:
    return made_apart(device, lambda: torch.tensor(order(padded, bits), device=device))
