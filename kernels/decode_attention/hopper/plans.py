"""How a group's heads lie in the kernel for Hopper, and how much of it fits into a block."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from palu.kernels.decode_attention.hopper.common import TILE as KERNEL_TILE
from palu.kernels.decode_attention.hopper.fields import fields_of
from palu.kernels.decode_attention.hopper.operands import CHUNK as KERNEL_CHUNK
from palu.kernels.decode_attention.hopper.operands import section_of
from palu.kernels.decode_attention.hopper.prologue import bias_columns
from palu.kernels.decode_attention.hopper.turns import LEAST as KERNEL_LEAST
from palu.kernels.decode_attention.hopper.turns import UNIT as KERNEL_UNIT
from palu.kernels.decode_attention.hopper.windows import SLOW as KERNEL_SLOW
from palu.kernels.decode_attention.hopper.windows import own_parts, parts_of_latents
from palu.kernels.decode_attention.spec import FAST_KEY_RANK, MOST_KEY_RANK
from palu.kernels.integers import cdiv, next_power_of_2

TILE, CHUNK, LEAST, COLUMNS = KERNEL_TILE.value, KERNEL_CHUNK.value, KERNEL_LEAST.value, KERNEL_UNIT.value
SLOW = KERNEL_SLOW.value
# Columns of a program's scores at most; of its keys, for the matrix units, numbers at least, and of codes units of 16
# bits and latents.
MOST_SLOTS, LEAST_RANK, LEAST_UNITS, LEAST_CODES = 32, 32, 16, 64
# Codes of fewer bits take copies of their own, and registers as these.
FEW_BITS = 4
# Latents of keys that are rebuilt at most that meet the factor all at once; of more, so many that programs still have
# two heads or more, whose registers they take.
MOST_AT_ONCE, WIDE_RANK = 128, FAST_KEY_RANK
# Columns of slow pairs at least.
LEAST_COLUMNS = 4
# kv heads at most of which all slow pairs can stay in shared memory; bytes of values under way that are enough beside
# them.
MOST_STAYING, STAYING_UNDER_WAY = 4, 24 << 10
# Tokens of a step at least, and slots of heads at most, whose codes are weighed by products of whole numbers.
LEAST_STEP, MOST_WHOLE_SLOTS = 32, 8
# kv heads of a group at most: what tells heads apart in the kernel counts on few.
MOST_KV = 8
# Registers of a thread for the sums of values.
MOST_SUMS = 96
# Registers of a thread for sums of values and for what codes became, which stay until their products are done.
MOST_OPERANDS = 112
# Latents of a group, keys' and values' together, at least: of less a program reads too little per tile.
LEAST_WIDTH = 256
# Of shared memory: what the compiler keeps, barriers, what slots' means are scaled with, and less by (512 at most).
RESERVED = 1024


class Plan(NamedTuple):
    """Tiles of keys under way for each group of warps that scores, tokens per step of the values, steps under way.

    stays: slow pairs of all heads' factors, of which windows are made, stay in shared memory.
    """

    key_stages: int
    step: int
    value_stages: int
    stays: bool = False

    def under_way(self, chunks: int, bits: int) -> int:
        """Bytes of values, of so many chunks of latents, that are on their way at a time."""
        return (self.value_stages - 1) * self.step * chunks * CHUNK * bits // 8


# In the order of preference, of which the first that fits is taken. Numbers are made of codes chunk after chunk, the
# more tokens at a time the better while there are registers.
LAST_PLANS = (Plan(1, 32, 4), Plan(1, 32, 3), Plan(1, 16, 5), Plan(1, 16, 4), Plan(1, 16, 3), Plan(1, 16, 2))
FIRST_PLANS = {
    "numbers": (Plan(2, 32, 4),), "whole": (Plan(2, 64, 4), Plan(1, 64, 4), Plan(1, 64, 3)), "folded": (),
    "rotated": (Plan(1, 64, 3),), "absorbed": (Plan(2, 32, 4),),
}  # fmt: skip

# What the full search tries.
GRID = tuple(Plan(*each) for each in itertools.product((1, 2, 3, 4), (16, 32, 64), (2, 3, 4, 5, 6)))


class Heads(NamedTuple):
    """How a group's query heads lie, and how they are scored.

    kv: kv heads; queries: heads of each, with room for `query_slots`; together: kv heads that share `columns` columns
    of scores; slots: columns in all; key_groups: whose heads they are.
    """

    mode: str
    kv: int
    queries: int
    query_slots: int
    together: int
    columns: int
    slots: int
    key_groups: int = 1

    @property
    def of_group(self) -> int:
        """kv heads of a key group."""
        return self.kv // self.key_groups


@functools.lru_cache(maxsize=4096)
def heads_of(num_heads: int, groups: int, kv: int | None, key_groups: int = 1) -> Heads:
    """The heads of one of so many programs, of so many kv heads, those of key_groups key groups together.

    kv: None where keys are absorbed: all queries have the group for a kv head.
    """
    queries = num_heads // groups // (kv or 1)
    if kv is None:
        slots = max(LEAST, next_power_of_2(queries))
        return Heads("absorbed", 1, queries, slots, 1, slots, slots)
    if queries == 1:
        slots = max(LEAST, next_power_of_2(kv))
        return Heads("folded", kv, 1, 1, kv, slots, slots, key_groups)
    query_slots = next_power_of_2(queries)
    # Of one key group: what their scores are multiplied with is its own.
    together = max(1, min(LEAST // query_slots, kv // key_groups))
    slots = next_power_of_2(LEAST * cdiv(kv, together))
    return Heads("rotated", kv, queries, query_slots, together, LEAST, slots, key_groups)


def mode_of(heads: Heads, windows: bool) -> str:
    """How the kernel scores; with windows of positions slow pairs are interpolated, the others folded or turned."""
    return {"folded": "windows", "rotated": "mixed"}[heads.mode] if windows else heads.mode


def weighers_of(mode: str, bits: int) -> int:
    """Groups of warps that weigh values: two where making numbers of codes takes longer than reading them."""
    return 2 if bits < 8 and mode == "absorbed" else 1


def scorers_of(mode: str, weighers: int, whole: int) -> int:
    """Groups of warps that score: absorbed, two only beside two that weigh whole numbers, which take few registers."""
    return 2 if mode != "absorbed" or (weighers == 2 and whole) else 1


def whole_slots(heads: Heads, bits: int, chunks: int) -> int:
    """Slots of a group's heads where codes are weighed by products of whole numbers (`whole`), else zero.

    More slots, or more chunks of value latents, would take too many registers.
    """
    last = (heads.kv - 1) * heads.query_slots + heads.queries
    used = heads.slots // 2 if heads.columns == heads.slots and 2 * last <= heads.slots else heads.slots
    fits = used <= MOST_WHOLE_SLOTS and _whole_registers(used, chunks, LEAST_STEP) <= MOST_OPERANDS
    return used if bits < 16 and fits else 0


def _whole_registers(slots: int, chunks: int, step: int) -> int:
    """Registers of a thread for sums of whole numbers and of float32, and for what codes became."""
    return chunks * 3 * slots + step // 2


def sections_of(ranks: Sequence[int], bits: int, mode: str) -> int:
    """In how many sections keys that are rebuilt meet the factor: of `section_of` latents each, or one of all."""
    return cdiv(max(ranks), section_of(bits)) if mode != "absorbed" and max(ranks) > MOST_AT_ONCE else 1


def padded_rank(ranks: Sequence[int], bits: int, mode: str) -> int:
    """Latents that a program reads of each group of keys."""
    least = LEAST_RANK if bits == 16 else max(LEAST_CODES, LEAST_UNITS * fields_of(bits))
    sections = sections_of(ranks, bits, mode)
    return sections * section_of(bits) if sections > 1 else max(least, next_power_of_2(max(ranks)))


@functools.lru_cache(maxsize=4096)
def plans_for(
    heads: Heads,
    head_dim: int,
    key_ranks: tuple[int, ...],
    value_ranks: tuple[int, ...],
    bits: tuple[int, int],
    memory: int,
    windows: bool,
    all_of_them: bool,
    has_bias: bool = False,
    has_norm: bool = False,
) -> tuple[Plan, ...]:
    """How much may be under way at a time in a block of so much shared memory: the best, or all plans that fit.

    bits: of keys and of values. windows: keys are interpolated in windows of positions, which those with biases or a
    norm are not.
    """
    key_bits, value_bits = bits
    mode, chunks = mode_of(heads, windows), cdiv(max(value_ranks), CHUNK)
    if not _are_taken(heads, head_dim, key_ranks, value_ranks, key_bits, windows) or chunks * heads.slots > MOST_SUMS:
        return ()
    if (has_bias or has_norm) and mode != "rotated":
        return ()
    weighers, whole = weighers_of(heads.mode, value_bits), whole_slots(heads, value_bits, chunks)
    rank, sections = padded_rank(key_ranks, key_bits, heads.mode), sections_of(key_ranks, key_bits, heads.mode)
    # Weights of fp16, or both bytes of those of two tiles by turns.
    weights = 4 * whole * 2 * TILE if whole else (1 if value_bits == 16 else 2) * heads.slots * TILE * 2
    # Bytes: numbers of 16 bits are kept, those of tiles are codes, which have scales and shifts.
    parameters = 4 if value_bits < 16 else 0
    kept = 2 * _kept(heads, mode, head_dim, rank, has_bias, has_norm)
    kept += weights + 8 * TILE * (heads.slots + parameters) + RESERVED
    fitting = []
    for plan in _preferred(heads, mode, value_bits, whole, sections, all_of_them):
        held = held_of(mode, sections, plan.stays) * _slow(heads, mode, rank, sections)
        keys = scorers_of(mode, weighers, whole) * plan.key_stages * TILE * heads.key_groups * rank
        values = weighers * plan.value_stages * plan.step * chunks * CHUNK
        tiles = keys * key_bits // 8 + values * value_bits // 8
        fits = _registers(plan, heads, chunks, value_bits, whole) <= MOST_OPERANDS and (
            not whole or plan.step >= LEAST_STEP
        )
        if fits and kept + 2 * held + tiles <= memory:
            fitting.append(plan)
    least = _least_under_way(fitting, heads, chunks, value_bits)
    fitting = [plan for plan in fitting if not plan.stays or plan.under_way(chunks, value_bits) >= least]
    return tuple(fitting if all_of_them else fitting[:1])


def _least_under_way(fitting: Sequence[Plan], heads: Heads, chunks: int, bits: int) -> int:
    """Bytes of values that have to be under way where slow pairs stay, of plans that fit, in their order.

    No more than where they do not. Programs of several key groups keep their slow pairs: else the compiler spills.
    """
    others = [plan.under_way(chunks, bits) for plan in fitting if not plan.stays]
    return min(STAYING_UNDER_WAY, others[0]) if others and heads.key_groups == 1 else 0


def _are_taken(
    heads: Heads, head_dim: int, key_ranks: Sequence[int], value_ranks: Sequence[int], bits: int, windows: bool
) -> bool:
    """Whether the kernel is made for such heads and ranks, whatever the memory."""
    rank = padded_rank(key_ranks, bits, heads.mode)
    if heads.slots > MOST_SLOTS or (heads.mode == "rotated" and heads.query_slots > LEAST):
        return False
    if rank > MOST_KEY_RANK or (heads.mode != "absorbed" and heads.kv > MOST_KV):
        return False
    if heads.key_groups * max(key_ranks) + max(value_ranks) < LEAST_WIDTH:
        return False
    if not _are_apart(heads, head_dim, windows):
        return False
    interpolated = next_power_of_2(head_dim) == 2 * COLUMNS and heads.slots <= COLUMNS // LEAST_COLUMNS
    return not windows or interpolated


def _are_apart(heads: Heads, head_dim: int, windows: bool) -> bool:
    """Whether no two key groups, of those of a program, have to share columns of scores or two units."""
    if heads.key_groups == 1:
        return True
    # Two units are under way at a time; with windows a head has one, or two heads have two.
    units = heads.of_group * (1 if windows else next_power_of_2(head_dim) // COLUMNS)
    places = heads.kv // heads.together
    apart = heads.mode == "folded" or (heads.of_group % heads.together == 0 and places * heads.columns == heads.slots)
    return units % 2 == 0 and apart


def _kept(heads: Heads, mode: str, head_dim: int, rank: int, has_bias: bool, has_norm: bool) -> int:
    """Numbers of 16 bits that stay in shared memory: what latents meet, and what stands beside it."""
    wide = next_power_of_2(head_dim)
    # A norm's weights are float32.
    biases, weights_of_norm = COLUMNS * bias_columns(heads.kv * wide // COLUMNS), 2 * wide
    return {
        "absorbed": heads.slots * rank,
        "folded": heads.kv * wide * rank,
        "rotated": heads.kv * wide * (rank + LEAST) + has_bias * biases + has_norm * weights_of_norm,
        # Two heads have a unit of fast pairs and one of slow ones; turned queries.
        "windows": cdiv(heads.kv, 2) * 2 * (COLUMNS * rank + COLUMNS * 4),
        # Fast pairs, windows of slow ones of every key group, queries.
        "mixed": (heads.kv + heads.key_groups) * COLUMNS * rank + heads.kv * heads.slots * COLUMNS,
    }[mode]


def held_of(mode: str, sections: int, stays: bool) -> int:
    """How many pieces of the slow pairs' factors, of which windows are made, are in shared memory at a time.

    Heads, of each group of warps that scores; with several queries ("mixed") sections of all heads.
    """
    if mode == "mixed":
        return sections if stays else 1
    return 1 + stays


def _slow(heads: Heads, mode: str, rank: int, sections: int) -> int:
    """Numbers of slow pairs' factors in shared memory for each that is held."""
    own = rank * own_parts(heads.kv, sections) // parts_of_latents(heads.kv, sections)
    return {"windows": 2 * 2 * SLOW * own, "mixed": heads.kv * COLUMNS * rank // sections}.get(mode, 0)


def _preferred(heads: Heads, mode: str, bits: int, whole: int, sections: int, all_of_them: bool) -> tuple[Plan, ...]:
    """The plans that are tried, in their order."""
    first = FIRST_PLANS["numbers" if bits == 16 else "whole" if whole else heads.mode]
    preferred = (*first, *LAST_PLANS, *(GRID if all_of_them else ()))
    staying = tuple(plan._replace(stays=True) for plan in preferred)
    if mode == "windows":
        staying = tuple(plan for plan in staying if plan.value_stages > 2)
        preferred = (*(staying if heads.kv <= MOST_STAYING else ()), *preferred)
    if mode == "mixed":
        preferred = (*staying, *(preferred if sections > 1 else ()))
    return tuple(dict.fromkeys(preferred))


def _registers(plan: Plan, heads: Heads, chunks: int, bits: int, whole: int) -> int:
    """Registers of a thread for sums of values and what codes became."""
    if bits == 16:
        return chunks * heads.slots
    if whole:
        return _whole_registers(whole, chunks, plan.step)
    return chunks * heads.slots + min(chunks, 2) * plan.step // 2
