"""What key latents are multiplied with, in the order in which packed codes come out of their words."""

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from palu.kernels.latents import LatentProjection

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


_ordered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def ordered_factor(key: LatentProjection, bits: int, dtype: torch.dtype) -> Tensor:
    """The up factor for codes of `bits` bits, [group_dim, groups * padded rank], zero where a group has no latent.

    Made once and kept as long as the factor, until that changes.
    """
    kept = _ordered.setdefault(key.up, {})
    version = None if key.up.is_inference() else key.up._version
    entry = (bits, dtype, tuple(key.ranks), version)
    if entry not in kept:
        kept.clear()
        with torch.inference_mode(False), torch.no_grad():
            kept[entry] = _reordered(key.up.detach().clone(), tuple(key.ranks), bits).to(dtype)
    return kept[entry]


def _reordered(up: Tensor, ranks: tuple[int, ...], bits: int) -> Tensor:
    padded = padded_rank(ranks)
    groups = [torch.nn.functional.pad(group, (0, padded - group.shape[1])) for group in up.split(list(ranks), dim=1)]
    return torch.cat([group[:, _order(padded, bits, up.device)] for group in groups], dim=1)


def ordered_query(query: Tensor, padded: int, bits: int) -> Tensor:
    """An absorbed query [rows, heads, largest rank] in the order of the codes, [rows, heads, padded]."""
    order = _order(padded, bits, query.device)
    return torch.nn.functional.pad(query, (0, padded - query.shape[-1]))[..., order]


@functools.lru_cache(maxsize=64)
def _order(padded: int, bits: int, device: torch.device) -> Tensor:
    part = min(padded, PART)
    order = [start + latent for start in range(0, padded, part) for latent in latent_order(part, bits)]
    with torch.inference_mode(False):
        return torch.tensor(order, device=device)
