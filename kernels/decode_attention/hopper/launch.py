"""Which calls Hopper's kernel takes, and its launch."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palu.kernels.decode_attention.hopper.common import TILE as KERNEL_TILE
from palu.kernels.decode_attention.hopper.kernel import hopper_kernel
from palu.kernels.decode_attention.hopper.rotated import LEAST as KERNEL_LEAST
from palu.kernels.decode_attention.hopper.values import CHUNK as KERNEL_CHUNK
from palu.kernels.decode_attention.parts import COMBINE_PARTS, Parts
from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latent_scores.launch import LOG2_E
from palu.kernels.latent_scores.layout import DTYPES, block_memory, divisor, mask_kind, processors, row_strides, side_of
from palu.kernels.latent_scores.tables import lane_table
from palu.kernels.latents import LatentProjection, Latents
from palu.kernels.rotation import Rotation
from palu.kernels.tuning import length_class, pick, searches

TILE, CHUNK, LEAST = KERNEL_TILE.value, KERNEL_CHUNK.value, KERNEL_LEAST.value
# Columns of a group's scores at most, and latents of its keys at least, for the matrix units.
MOST_SLOTS, LEAST_RANK = 32, 32
# kv heads of a group at most: what tells heads apart in the kernel counts on few.
MOST_KV = 8
# Latents of a group's keys at most where they are rebuilt, and registers of a thread for the sums of values.
MOST_RANK, MOST_SUMS = 256, 96
# Latents of a group, keys' and values' together, at least: of less a program reads too little per tile.
LEAST_WIDTH = 256
# What the compiler keeps in shared memory.
RESERVED = 1024
# Parts that are added up at once.
MOST_PARTS = 2 * COMBINE_PARTS
# What a program costs beside its tiles, in tiles.
START = 3
VALUE_REGISTERS = 240


class Plan(NamedTuple):
    """Tiles of keys under way, tokens per step of the values, steps under way."""

    key_stages: int
    step: int
    value_stages: int


# In the order of preference, of which the first that fits is taken.
PLANS = (
    Plan(4, 32, 4), Plan(3, 32, 4), Plan(3, 32, 3), Plan(2, 16, 5), Plan(2, 16, 4), Plan(2, 16, 3), Plan(2, 16, 2),
)  # fmt: skip

# What the full search tries.
GRID = tuple(Plan(*each) for each in itertools.product((2, 3, 4), (16, 32, 64), (2, 3, 4, 5, 6)))


class Heads(NamedTuple):
    """How a group's query heads lie, and how they are scored.

    kv: kv heads; queries: heads of each, with room for `query_slots`; together: kv heads that share `columns` columns
    of scores; slots: columns in all.
    """

    mode: str
    kv: int
    queries: int
    query_slots: int
    together: int
    columns: int
    slots: int


@functools.lru_cache(maxsize=4096)
def heads_of(num_heads: int, groups: int, kv: int | None) -> Heads:
    """The heads of one group of so many kv heads; None: keys are absorbed, all queries have the group for a kv head."""
    queries = num_heads // groups // (kv or 1)
    if kv is None:
        slots = max(LEAST, next_power_of_2(queries))
        return Heads("absorbed", 1, queries, slots, 1, slots, slots)
    if queries == 1:
        slots = max(LEAST, next_power_of_2(kv))
        return Heads("folded", kv, 1, 1, kv, slots, slots)
    query_slots = next_power_of_2(queries)
    together = max(1, min(LEAST // query_slots, kv))
    slots = next_power_of_2(LEAST * cdiv(kv, together))
    return Heads("rotated", kv, queries, query_slots, together, LEAST, slots)


def padded_rank(ranks: Sequence[int]) -> int:
    """Latents that a program reads of each group of keys."""
    return max(LEAST_RANK, next_power_of_2(max(ranks)))


def can_take(
    query: Tensor, key_latents: Latents, value_latents: Latents, key: LatentProjection, value: LatentProjection,
    key_norm: object,
) -> bool:  # fmt: skip
    """Whether the kernel takes this call, which `launch.can_take` does: numbers of 16 bits, the same groups."""
    numbers = [latents for latents in (key_latents, value_latents) if isinstance(latents, Tensor)]
    plain = key.bias is None and key_norm is None and query.dtype != torch.float32 and len(numbers) == 2
    # Copies to shared memory are 16 bytes wide and convert nothing; Triton asks of what strides are multiples of 16.
    read = numbers if key.up is None else [*numbers, key.up]
    aligned = all(part.data_ptr() % 16 == 0 and part.stride(-1) == 1 and part.dtype == query.dtype for part in read)
    aligned = aligned and all(stride % 16 == 0 for part in read for stride in part.stride()[:-1])
    if not (plain and aligned and len(key.ranks) == len(value.ranks)):
        return False
    _, num_heads, _, width = query.shape
    heads = heads_of(num_heads, len(key.ranks), None if key.up is None else key.up.shape[0] // width)
    return bool(plans_for(heads, width, tuple(key.ranks), tuple(value.ranks), block_memory(query.device), False))


@functools.lru_cache(maxsize=4096)
def plans_for(
    heads: Heads,
    head_dim: int,
    key_ranks: tuple[int, ...],
    value_ranks: tuple[int, ...],
    memory: int,
    all_of_them: bool,
) -> tuple[Plan, ...]:
    """How much may be under way at a time in a block of so much shared memory: the best, or all plans that fit."""
    rank, wide = padded_rank(key_ranks), next_power_of_2(head_dim)
    rebuilt = heads.mode != "absorbed"
    if heads.slots > MOST_SLOTS or (heads.mode == "rotated" and heads.query_slots > LEAST):
        return ()
    if rebuilt and (heads.kv > MOST_KV or rank > MOST_RANK):
        return ()
    if max(key_ranks) + max(value_ranks) < LEAST_WIDTH:
        return ()
    kept = heads.kv * wide * rank if rebuilt else heads.slots * rank
    if heads.mode == "rotated":
        kept += heads.kv * wide * LEAST
    chunks = cdiv(max(value_ranks), CHUNK)
    if chunks * heads.slots > MOST_SUMS:
        return ()
    value_width = chunks * CHUNK
    fitting = []
    for plan in dict.fromkeys((*PLANS, *(GRID if all_of_them else ()))):
        numbers = kept + plan.key_stages * TILE * rank + plan.value_stages * plan.step * value_width
        numbers += heads.slots * TILE
        if 2 * numbers + 8 * TILE * heads.slots + RESERVED <= memory:
            fitting.append(plan)
    return tuple(fitting if all_of_them else fitting[:1])


@functools.lru_cache(maxsize=4096)
def parts_of(tiles: int, others: int, processors: int) -> int:
    """Programs that share the tiles, where there are so many others at a time: those that end first, if in waves."""
    most = max(1, min(tiles, MOST_PARTS, cdiv(4 * processors, others)))
    times = {n: cdiv(n * others, processors) * (cdiv(tiles, n) + START) for n in range(1, most + 1)}
    return min(times, key=lambda parts: (times[parts], parts))


def launch(
    query: Tensor, key_latents: Tensor, value_latents: Tensor, key: LatentProjection, value: LatentProjection,
    rotation: Rotation | None, mask: Tensor | None, rows_per_latent: int, scaling: float,
) -> Parts:  # fmt: skip
    """Sums over parts of the tokens of queries [rows, num_heads, head_dim or, absorbed, width].

    mask: [rows or 1, length] or None; rows_per_latent: rows that read the same row of latents.
    """
    _, num_heads, width = query.shape
    ranks, device = (tuple(key.ranks), tuple(value.ranks)), query.device
    heads = heads_of(num_heads, len(key.ranks), None if key.up is None else key.up.shape[0] // width)
    search = searches()
    plans = plans_for(heads, width, *ranks, block_memory(device), search)
    call = (heads, query, key_latents, value_latents, key, value, rotation, mask, rows_per_latent, scaling)
    if not search:
        return _launch(plans[0], *call)
    length = length_class(key_latents.shape[1])
    shape_class = ("hopper", heads, query.shape, *ranks, query.dtype, mask_kind(mask), length)
    return _launch(pick(shape_class, plans, lambda plan: _launch(plan, *call), device), *call)


def _launch(
    plan: Plan, heads: Heads, query: Tensor, key_latents: Tensor, value_latents: Tensor, key: LatentProjection,
    value: LatentProjection, rotation: Rotation | None, mask: Tensor | None, rows_per_latent: int, scaling: float,
) -> Parts:  # fmt: skip
    rows, num_heads, width = query.shape
    absorbed, groups, length, device = key.up is None, len(key.ranks), key_latents.shape[1], query.device
    ranks, value_ranks = tuple(key.ranks), tuple(value.ranks)
    parts = parts_of(cdiv(length, TILE), groups * rows, processors(device))
    sums = query.new_empty(parts, rows, num_heads, max(value_ranks), dtype=torch.float32)
    totals, peaks = query.new_empty(2, parts, rows, num_heads, dtype=torch.float32)
    table = key_latents if absorbed else lane_table(rotation, query.dtype)
    scaling *= LOG2_E * (1.0 if rotation is None else rotation.attention_scaling)
    side, value_side = side_of(ranks, 16, device), side_of(value_ranks, 16, device)
    hopper_kernel[(parts, groups, rows)](
        query, key_latents, value_latents, query if absorbed else key.up, table, query if mask is None else mask,
        sums, totals, peaks, side.rank, side.offset, value_side.rank, value_side.offset,
        length, *key_latents.stride()[:2], *value_latents.stride()[:2], 0 if absorbed else key.up.stride(0),
        *((0, 0) if absorbed else row_strides(table)), *((0, 0) if mask is None else row_strides(mask)),
        query.stride(1), rows * num_heads, scaling,
        MODE=heads.mode, GROUPS=groups, KV=heads.kv, QUERIES=heads.queries, QUERY_SLOTS=heads.query_slots,
        SLOTS=heads.slots, QUERY_ROWS=rows_per_latent, WIDTH=width, WIDE=next_power_of_2(width),
        RANK=padded_rank(ranks), KEY_STAGES=plan.key_stages, KEY_DIVISOR=divisor(ranks),
        CHUNKS=cdiv(max(value_ranks), CHUNK), STEP=plan.step, VALUE_STAGES=plan.value_stages,
        VALUE_DIVISOR=divisor(value_ranks), RANK_STRIDE=max(value_ranks), MASK=mask_kind(mask),
        DTYPE=DTYPES[query.dtype], TOGETHER=heads.together, COLUMNS=heads.columns, VALUE_REGISTERS=VALUE_REGISTERS,
        num_warps=4,
    )  # fmt: skip
    return Parts(sums, totals, peaks)
