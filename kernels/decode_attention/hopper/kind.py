"""Which calls Hopper's kernel takes, and how: worked out once for calls that are alike."""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from palu.kernels.decode_attention.hopper.plans import (
    CHUNK,
    FEW_BITS,
    WIDE_RANK,
    Heads,
    Plan,
    heads_of,
    padded_rank,
    plans_for,
    sections_of,
    weighers_of,
)
from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latent_scores.layout import block_memory, mask_kind
from palu.kernels.latents import LatentProjection, Latents, Stretch, stretches
from palu.kernels.packing import PLANES, last_plane
from palu.kernels.quantize import WHOLE_ZEROS, PackedLatents

# Programs at most that share a group's heads: each reads all of the group's latents.
MOST_SHARES = 8
# Bytes of values that have to be on their way to a program, so that memory is read as fast as it can be.
LEAST_UNDER_WAY = 12 << 10
# Bits of codes that the kernel can make numbers of.
CODES = (8, 4, 3, 2)
# Bytes that copies of numbers and of codes take at once; of fewer bits not all places are multiples of as many.
COPY, LEAST_COPY = 16, 4
# Stretches of exact tokens beside codes: the first ones and the newest.
MOST_BESIDE = 2


@dataclass(frozen=True, eq=False)
class Kind:
    """A call but for its tensors, its rows and the tokens. `the_kind` keeps each, so that what it needs is found once.

    width: of a query; kv: kv heads of a group, None where keys are absorbed; query_dtype: of the model; mask: as
    `mask_kind` calls it; rows_per_latent: rows that read the same row of latents; memory: bytes that a block may
    have; copies: bytes that a copy of keys and one of values takes at once; is_beside: whether tokens are exact
    ones beside others of the same call, few as a rule; shares: programs that share the heads of a key group;
    key_groups: whose heads one program has.
    """

    num_heads: int
    width: int
    kv: int | None
    key_ranks: tuple[int, ...]
    value_ranks: tuple[int, ...]
    bits: int
    value_bits: int
    asymmetric: bool
    query_dtype: torch.dtype
    has_bias: bool
    has_norm: bool
    mask: str
    rows_per_latent: int
    memory: int
    copies: tuple[int, int] = (COPY, COPY)
    is_beside: bool = False
    shares: int = 1
    key_groups: int = 1

    @functools.cached_property
    def groups(self) -> int:
        """Programs for the heads of a row and a part."""
        return len(self.key_ranks) * self.shares // self.key_groups

    @functools.cached_property
    def heads(self) -> Heads:
        """How the query heads of a program lie."""
        kv = self.kv and self.kv * self.key_groups // self.shares
        return heads_of(self.num_heads, self.groups, kv, self.key_groups)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Of the numbers that are multiplied: codes become fp16, whatever the model's."""
        return self.query_dtype if self.bits == 16 else torch.float16

    @functools.cached_property
    def weighers(self) -> int:
        """Groups of warps that weigh values."""
        return weighers_of(self.heads.mode, self.value_bits)

    @functools.cached_property
    def rank(self) -> int:
        """As `padded_rank`."""
        return padded_rank(self.key_ranks, self.bits, self.heads.mode)

    @functools.cached_property
    def sections(self) -> int:
        """As `sections_of`."""
        return sections_of(self.key_ranks, self.bits, self.heads.mode)

    @functools.cached_property
    def planes(self) -> tuple[int, int]:
        """Bytes of a token's key and value codes before their last planes."""
        if self.bits == 16:
            return 0, 0
        return last_plane(sum(self.key_ranks), self.bits), last_plane(sum(self.value_ranks), self.value_bits)

    @functools.cached_property
    def is_taken(self) -> bool:
        """Whether ranks and heads are such as the kernel takes, and fit."""
        # Values of several key groups may be in the same latents, not the other way round.
        joined = len(self.key_ranks) % len(self.value_ranks) == 0
        # One folded head of so many latents is slower than the other launches.
        narrow = self.heads.mode != "folded" or self.rank <= WIDE_RANK
        fast = narrow or self.is_beside or (self.heads.kv > 1 and self.takes_windows)
        return joined and fast and bool(self.plans(False, False))

    @functools.cached_property
    def reads_ahead(self) -> bool:
        """Whether a program of several key groups has room for enough values under way, which codes leave."""
        if self.key_groups == 1 or self.bits < 16:
            return True
        chunks = cdiv(max(self.value_ranks), CHUNK)
        return self.plans(False, False)[0].under_way(chunks, self.value_bits) >= LEAST_UNDER_WAY

    @functools.cached_property
    def takes_windows(self) -> bool:
        """Whether keys are interpolated in windows of positions where that is faster."""
        # Several queries' numbers take longer to read than to multiply, unless keys have many latents. Codes of so many
        # that a program has a head or two take registers that windows lack.
        exact = self.rank > WIDE_RANK if self.bits < 16 else self.sections == 1
        exact = self.heads.mode == "absorbed" or (self.heads.mode == "rotated" and exact)
        return not exact and bool(self.plans(True, False))

    @functools.cached_property
    def smaller(self) -> Optional["Kind"]:
        """The same with fewer heads for each program: of fewer key groups, or half of one's; None if there is none."""
        if self.key_groups > 1:
            joined = len(self.key_ranks) // len(self.value_ranks)
            return replace(self, key_groups=max(n for n in range(1, self.key_groups) if joined % n == 0))
        if self.heads.mode == "absorbed" or self.heads.kv % 2 == 1 or self.shares == MOST_SHARES:
            return None
        return replace(self, shares=2 * self.shares)

    @functools.cached_property
    def smaller_if_short(self) -> Optional["Kind"]:
        """`smaller` where that fits, and is faster if each program has a tile or two."""
        smaller = self.smaller if self.heads.mode == "rotated" else None
        return smaller if smaller is not None and smaller.plans(False, False) else None

    def plans(self, windows: bool, all_of_them: bool) -> tuple[Plan, ...]:
        """As `plans_for`."""
        kind = (self.heads, self.width, self.key_ranks, self.value_ranks, (self.bits, self.value_bits), self.memory)
        return plans_for(*kind, windows, all_of_them, self.has_bias, self.has_norm)


# The same object for the same call.
the_kind = functools.lru_cache(maxsize=4096)(Kind)


class Stretches(NamedTuple):
    """Which stretch has the codes, else most tokens, its kind, and that of exact tokens beside it, or None."""

    main: int
    kind: Kind
    beside: Kind | None


def stretches_of(
    query: Tensor, key_latents: Latents, value_latents: Latents, key: LatentProjection, value: LatentProjection,
    mask: Tensor | None, key_norm: object,
) -> Stretches | None:  # fmt: skip
    """The kinds of a call's stretches of tokens, None if the kernel does not take all of them.

    It takes one of any kind, that of codes if there is one, and up to MOST_BESIDE of exact tokens. Arguments as of
    `kind_of`.
    """
    sides = stretches(key_latents), stretches(value_latents)
    lengths = [[part.shape[1] for part in side] for side in sides]
    if lengths[0] != lengths[1] or len(lengths[0]) > 1 + MOST_BESIDE:
        return None
    both = list(zip(*sides, strict=True))
    main = max(range(len(both)), key=lambda index: (isinstance(both[index][0], PackedLatents), lengths[0][index]))
    kinds = [kind_of(query, *each, key, value, mask, key_norm, index != main) for index, each in enumerate(both)]
    # One kind at most, as there is one object for each.
    beside = set(kinds[:main] + kinds[main + 1 :])
    if None in kinds or len(beside) > 1 or any(kind.bits < 16 for kind in beside):
        return None
    return Stretches(main, kinds[main], next(iter(beside), None))


def kind_of(
    query: Tensor, key_latents: Stretch, value_latents: Stretch, key: LatentProjection, value: LatentProjection,
    mask: Tensor | None, key_norm: object, is_beside: bool = False,
) -> Kind | None:  # fmt: skip
    """The kind of a call that the kernel takes, None of others; of those that `launch.can_take` takes.

    Both sides have 16 bits, or both have codes, and each value group has the values of as many key groups.
    Arguments as of `decode_attention` and of `Kind`.
    """
    bits, value_bits = _bits(key_latents, query.dtype), _bits(value_latents, query.dtype)
    if bits is None or value_bits is None or (bits == 16) != (value_bits == 16) or query.dtype == torch.float32:
        return None
    # Copies to shared memory convert nothing, those of factors are 16 bytes wide.
    absorbed = key.up is None
    if not (absorbed or (_aligned(key.up) and key.up.dtype == query.dtype)):
        return None
    copies = _copied(key_latents, tuple(key.ranks)), _copied(value_latents, tuple(value.ranks))
    if not all(copies):
        return None
    _, num_heads, queries, width = query.shape
    # Places of scales and of cosines are numbers of 32 bits.
    table = 1 if absorbed else next_power_of_2(width)
    if not 0 < key_latents.shape[1] * max(table, _stride(key_latents), _stride(value_latents)) < 1 << 31:
        return None
    asymmetric = bits < 16 and key_latents.zeros is not None
    if bits < 16 and asymmetric != (value_latents.zeros is not None):
        return None
    found = the_kind(
        num_heads, width, None if absorbed else key.up.shape[0] // width, tuple(key.ranks), tuple(value.ranks),
        bits, value_bits, asymmetric, query.dtype, key.bias is not None, key_norm is not None, mask_kind(mask), queries,
        block_memory(query.device), copies, is_beside,
        key_groups=1 if absorbed else max(1, len(key.ranks) // len(value.ranks)),
    )  # fmt: skip
    # All heads whose values are in the same latents, which are then read once; fewer need less of the up factor.
    fitting = None
    while found is not None and not (found.is_taken and found.reads_ahead):
        fitting = fitting or (found if found.is_taken else None)
        found = found.smaller
    return found or fitting


def _bits(latents: Stretch, dtype: torch.dtype) -> int | None:
    """Bits of latents that the kernel can read, None of others."""
    if isinstance(latents, PackedLatents):
        kind = latents.quantization
        # Symmetric codes' zero points are whole at any number of bits, and those of few bits may have fractions.
        whole = kind.symmetric or kind.whole_zeros
        return kind.bits if kind.bits in CODES and (whole or kind.bits < WHOLE_ZEROS) else None
    return 16 if latents.dtype == dtype else None


def _copied(latents: Stretch, ranks: tuple[int, ...]) -> int:
    """Bytes, up to COPY, of which the places of all tokens', groups' and planes' latents are multiples, or 0 if few."""
    packed = isinstance(latents, PackedLatents)
    numbers, bits = (latents.codes, latents.quantization.bits) if packed else (latents, 16)
    *others, last = numbers.stride()
    # Triton asks of what strides, in numbers, are multiples of 16.
    found, place = math.gcd(_grouped(ranks, bits), *others), numbers.data_ptr()
    if place % found and bits < FEW_BITS:
        # Whatever the first of the tokens that a cache still has, one more size is enough.
        found = math.gcd(found, place, LEAST_COPY)
    least = COPY if bits >= FEW_BITS else LEAST_COPY
    return found if last == 1 and place % found == 0 and found >= least else 0


@functools.lru_cache(maxsize=4096)
def _grouped(ranks: tuple[int, ...], bits: int) -> int:
    """As `_copied`, of the groups' latents and of planes behind a token's first latent."""
    if bits == 16:
        return math.gcd(COPY, *[2 * rank for rank in ranks])
    return math.gcd(
        COPY, last_plane(sum(ranks), bits), *[rank * plane // 8 for rank in ranks for plane in PLANES[bits]]
    )


def _stride(latents: Stretch) -> int:
    """From a token's scales to the next one's."""
    return latents.scales.stride(1) if isinstance(latents, PackedLatents) else 0


def _aligned(numbers: Tensor) -> bool:
    *others, last = numbers.stride()
    return last == 1 and numbers.data_ptr() % 16 == 0 and not any([stride % 16 for stride in others])
