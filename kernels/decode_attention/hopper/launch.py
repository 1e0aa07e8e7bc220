"""The launch of Hopper's kernel and that of the one that adds its parts up."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palu.kernels.decode_attention.hopper.combine import CHUNK as KERNEL_CHUNK
from palu.kernels.decode_attention.hopper.combine import MOST_CHUNKS as KERNEL_MOST_CHUNKS
from palu.kernels.decode_attention.hopper.combine import WARPS as KERNEL_WARPS
from palu.kernels.decode_attention.hopper.combine import hopper_combine_kernel
from palu.kernels.decode_attention.hopper.constants import constants_of
from palu.kernels.decode_attention.hopper.factor import factor_of_codes
from palu.kernels.decode_attention.hopper.kernel import hopper_kernel
from palu.kernels.decode_attention.hopper.kind import Kind, Stretches
from palu.kernels.decode_attention.hopper.plans import COLUMNS, SLOW, TILE, Plan
from palu.kernels.decode_attention.hopper.sharing import MOST_PARTS, parts_of, parts_together
from palu.kernels.decode_attention.hopper.spans import spans_of
from palu.kernels.decode_attention.hopper.windows import COLUMNS as KERNEL_COLUMNS
from palu.kernels.decode_attention.hopper.windows import FAST as KERNEL_FAST
from palu.kernels.decode_attention.parts import Parts, combine
from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latent_scores.launch import LOG2_E
from palu.kernels.latent_scores.layout import divisor, even_rank, layout, processors, row_strides, side_of
from palu.kernels.latent_scores.tables import lane_table
from palu.kernels.latents import LatentProjection, Latents, Stretch, stretches
from palu.kernels.relaunch import Constants, relaunch
from palu.kernels.rotation import Rotation, Window
from palu.kernels.tuning import length_class, pick, searches

WINDOW_FAST, WINDOW_COLUMNS = KERNEL_FAST.value, KERNEL_COLUMNS.value
COMBINE_WARPS, COMBINE_CHUNK, MOST_CHUNKS = KERNEL_WARPS.value, KERNEL_CHUNK.value, KERNEL_MOST_CHUNKS.value
# Parts at least that a program adds up, and numbers of a head that it computes: all programs of a head read all parts.
# Of so many chunks of latents there are registers for fewer numbers.
LEAST_PARTS, OUTPUTS, FEWER_OUTPUTS, MANY_CHUNKS = 16, (32, 64, 128), (32, 64), 4
# Tiles of a program from which on windows are worth their making.
LEAST_TILES = 8
# Pairs of keys with several queries that are rebuilt where the others are interpolated.
FAST = COLUMNS // 2


class Call(NamedTuple):
    """What is computed for a stretch of tokens, from `start` on: as the arguments of `launch`.

    rotation, mask: of all tokens.
    """

    kind: Kind
    query: Tensor
    key_latents: Stretch
    value_latents: Stretch
    start: int
    key: LatentProjection
    rotation: Rotation | None
    mask: Tensor | None
    scaling: float
    key_norm: Any

    @property
    def length(self) -> int:
        """Tokens."""
        return self.key_latents.shape[1]

    @property
    def tiles(self) -> int:
        """Tiles of tokens."""
        return cdiv(self.length, TILE)


class Means(NamedTuple):
    """Mean latents of parts of the tokens, [parts, rows, heads, rank], of which combining reads half of what sums take.

    logarithms: of the weights' sums, of base 2, float32 [parts, rows, heads].
    """

    means: Tensor
    logarithms: Tensor


class Tables(NamedTuple):
    """What weighs products by token, all and fast pairs, where the rows' tokens stand, and what windows are made with.

    Tables are of all tokens, spans of a stretch's. window: None if no row is computed in windows of positions; the
    other tensors but the first stand for nothing then.
    """

    table: Tensor
    fast_table: Tensor
    spans: Tensor
    frequencies: Tensor
    window: Window | None


class Launch(NamedTuple):
    """A call's stretches of tokens, `Stretches.main` first, and the parts that programs make of each.

    tables: of the first one. factor: likewise, the up factor that keys meet, as `factor_of_codes` returns it.
    """

    calls: list[Call]
    parts: tuple[int, ...]
    tables: Tables
    factor: tuple[Tensor, float, bool]

    @property
    def count(self) -> int:
        """Parts whose means are stored."""
        return sum(parts * call.kind.weighers for parts, call in zip(self.parts, self.calls, strict=True))


def launch(
    found: Stretches, query: Tensor, key_latents: Latents, value_latents: Latents, key: LatentProjection,
    value: LatentProjection, rotation: Rotation | None, mask: Tensor | None, scaling: float, head_dim: int,
    key_norm: Any,
) -> Tensor:  # fmt: skip
    """The heads' outputs of queries [rows, num_heads, head_dim or, absorbed, width], as `parts.combine` returns them.

    found: by `stretches_of`; mask: [rows or 1, length] or None.
    """
    calls, start = [], 0
    for index, (keys, values) in enumerate(zip(stretches(key_latents), stretches(value_latents), strict=True)):
        kind = found.kind if index == found.main else found.beside
        calls.append(Call(kind, query, keys, values, start, key, rotation, mask, scaling, key_norm))
        start += keys.shape[1]
    calls.insert(0, calls.pop(found.main))
    planned = _planned(calls)
    rows, num_heads, _ = query.shape
    means = Means(
        query.new_empty(planned.count, rows, num_heads, max(value.ranks)),
        query.new_empty(planned.count, rows, num_heads, dtype=torch.float32),
    )
    _launch_best(planned, means)
    return _combine_early(means, value, query, head_dim)


def _planned(calls: list[Call]) -> Launch:
    """How the tokens are shared out."""
    rows, programs = calls[0].query.shape[0], processors(calls[0].query.device)
    tiles, kinds = tuple(call.tiles for call in calls), [call.kind for call in calls]
    others = tuple(kind.groups * rows for kind in kinds)
    if len(calls) == 1:
        counts = (parts_of(tiles[0], others[0], programs),)
    else:
        counts = parts_together(tiles, others, tuple(kind.weighers for kind in kinds), programs)
    smaller, halves = [kind.smaller_if_short for kind in kinds], tuple(cdiv(own, 2) for own in tiles)
    is_short = None not in smaller and all(count >= half for count, half in zip(counts, halves, strict=True))
    if is_short and sum(kind.groups * rows * half for kind, half in zip(smaller, halves, strict=True)) <= programs:
        # Half of the factor to copy, and no more parts to add up.
        calls = [call._replace(kind=kind) for call, kind in zip(calls, smaller, strict=True)]
        counts = halves
    first = calls[0]
    return Launch(calls, counts, _tables(first, cdiv(first.tiles, counts[0]) >= LEAST_TILES), _factor(first))


def _factor(call: Call) -> tuple[Tensor, float, bool]:
    """The up factor that keys meet, as `factor_of_codes`; the query's tensor stands for none."""
    kind, key = call.kind, call.key
    if key.up is None or kind.bits == 16:
        return call.query if key.up is None else key.up, 1.0, False
    folded, extras = kind.heads.mode == "folded", kind.has_bias or kind.has_norm
    return factor_of_codes(key, kind.rank, kind.bits, kind.dtype, folded, extras, kind.sections > 1)


def _window_of(call: Call) -> Window | None:
    """In what windows of positions the call's keys can be interpolated, where that is faster."""
    if not call.kind.takes_windows:
        return None
    heads = call.kind.heads
    if heads.mode == "folded":
        return call.rotation.window(WINDOW_FAST, SLOW, WINDOW_COLUMNS, lanes=True)
    return call.rotation.window(FAST, COLUMNS - FAST, COLUMNS // heads.slots)


def _launch_best(planned: Launch, means: Means) -> None:
    """Launch with the best plan, of calls with windows for these: rows with gaps are few."""
    call, window = planned.calls[0], planned.tables.window
    plans = call.kind.plans(window is not None, searches())
    plan = plans[0]
    if len(plans) > 1:
        shape_class = ("hopper", *[each.kind for each in planned.calls], call.query.shape[0], window and window.span)
        lengths = [length_class(each.length) for each in planned.calls]
        plan = pick(
            (*shape_class, *lengths), plans, lambda plan: _launch(plan, planned, means), call.query.device
        )  # fmt: skip
    _launch(plan, planned, means)


def _tables(call: Call, is_long: bool) -> Tables:
    """Made once for all layers of a kind; `is_long`: whether programs have so many tiles that windows are worth it."""
    kind, query, rotation, start = call.kind, call.query, call.rotation, call.start
    if rotation is None:
        return Tables(query, query, query, query, None)
    length = call.length

    def make() -> Tables:
        # Asked for at any length, so that a short call before is enough where a step is captured in a CUDA graph.
        window = _window_of(call)
        table = lane_table(rotation, torch.float16)
        if window is None or not is_long:
            return Tables(table, table, table, table, None)
        fast_table = lane_table(rotation, torch.float16, WINDOW_FAST if kind.heads.mode == "folded" else FAST)
        spans = spans_of(rotation, call.mask, start, length, kind.rows_per_latent, TILE)
        return Tables(table, fast_table, spans, rotation.frequencies.to(query.device, torch.float32), window)

    mask = call.mask if is_long and kind.takes_windows else None
    return Tables(*rotation.seen(("hopper", kind, start, length, is_long), mask, make))


def _launch(plan: Plan, planned: Launch, means: Means) -> None:
    """Launch with a plan, of calls with windows for these."""
    (call, *beside), parts, tables, (up, power, scaled) = planned
    kind, query, key_latents, value_latents, start, key, rotation, mask, scaling, key_norm = call
    rows, absorbed, device = query.shape[0], key.up is None, query.device
    (keys, key_parameters), key_strides, _, _ = layout(key_latents)
    (values, value_parameters), value_strides, _, _ = layout(value_latents)
    scaling *= LOG2_E * (1.0 if rotation is None else rotation.attention_scaling)
    window, spans, filler = tables.window, tables.spans, tables.table
    side, value_side = side_of(kind.key_ranks, 16, device), side_of(kind.value_ranks, 16, device)
    exact, exact_numbers = _beside(beside, parts[1:], query, up)
    grid = (parts[0], kind.groups, rows)
    if beside:
        grid = (sum(count * each.kind.groups for count, each in zip(parts, planned.calls, strict=True)), 1, rows)
    relaunch(
        hopper_kernel, grid,
        query, keys, values, up, key.bias if kind.has_bias else query, key_norm.weight if kind.has_norm else query,
        tables.table, tables.fast_table, query if mask is None else mask,
        key_parameters, value_parameters,
        spans, *((filler, filler) if window is None else (window.bases, window.basis)), tables.frequencies, *means,
        side.rank, side.offset, value_side.rank, value_side.offset, *exact,
        call.length, *key_strides[:2], *value_strides[:2], *kind.planes,
        *key_strides[2:], *value_strides[2:],
        0 if absorbed else up.stride(0), *((0, 0) if absorbed else row_strides(tables.table)),
        *((0, 0) if window is None else row_strides(tables.fast_table)),
        *((0, 0) if mask is None else row_strides(mask)), spans.stride(0) if spans.shape[0] > 1 else 0,
        query.stride(1), rows * kind.num_heads, scaling * power, key_norm.variance_epsilon if kind.has_norm else 0.0,
        parts[0], start, 0 if absorbed else exact[0].stride(0), scaling, *exact_numbers,
        constants=constants_of(
            kind, plan, 0 if window is None else window.span, scaled, beside[0].kind if beside else None
        ),
    )  # fmt: skip


def _beside(
    calls: Sequence[Call], parts: Sequence[int], query: Tensor, up: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What the kernel takes of exact tokens beside the others: tensors and numbers, which stand for nothing of none."""
    if not calls:
        return (up, query, query, query, query), (0,) * 14
    first, more = calls[0], calls[-1]
    latents = first.key_latents, first.value_latents, more.key_latents, more.value_latents
    strides = [each.stride()[:2] for each in latents]
    numbers = (first.length, first.start, parts[0], *strides[0], *strides[1])
    # Of the second stretch, if there is one.
    numbers += (more.length, more.start, parts[1] if len(parts) > 1 else 0, *strides[2], *strides[3])
    return (query if first.key.up is None else first.key.up, *latents), numbers


def _combine_early(means: Means, value: LatentProjection, query: Tensor, head_dim: int) -> Tensor:
    """As `parts.combine`, of means that a launch makes which allows this one to begin before it ends."""
    rows, num_heads, _ = query.shape
    ranks, count = tuple(value.ranks), means.means.shape[0]
    chunks = cdiv(max(ranks), COMBINE_CHUNK)
    fits = chunks <= MOST_CHUNKS and count <= MOST_PARTS and means.means.numel() < 1 << 31
    if value.up is None or not fits:
        return combine(Parts(means.means, None, means.logarithms), value, query, head_dim)
    side, programs = side_of(ranks, 16, query.device), processors(query.device)
    outputs, alone = outputs_of(rows * num_heads, head_dim, chunks, programs)
    output = query.new_empty(rows, num_heads, head_dim)
    relaunch(
        hopper_combine_kernel, (rows * num_heads, cdiv(head_dim, outputs)),
        *means, value.up, value.up if value.bias is None else value.bias, output, side.rank, side.offset,
        count, rows * num_heads, value.up.stride(0),
        constants=_combine_constants(
            num_heads, value.up.shape[0], ranks, head_dim, next_power_of_2(count), value.bias is not None,
            outputs, alone,
        ),
    )  # fmt: skip
    return output.view(rows, -1)


@functools.lru_cache(maxsize=4096)
def outputs_of(rows_heads: int, head_dim: int, chunks: int, processors: int) -> tuple[int, bool]:
    """The fewest numbers per program with which each has a multiprocessor to itself, else the most; which of both."""
    wide = next_power_of_2(head_dim)
    fitting = [outputs for outputs in (OUTPUTS if chunks < MANY_CHUNKS else FEWER_OUTPUTS) if outputs <= wide]
    for outputs in fitting:
        if rows_heads * cdiv(head_dim, outputs) <= processors:
            return outputs, True
    return fitting[-1], False


@functools.lru_cache(maxsize=4096)
def _combine_constants(
    num_heads: int, group_dim: int, ranks: tuple[int, ...], head_dim: int, count: int, has_bias: bool, outputs: int,
    alone: bool,
) -> Constants:  # fmt: skip
    """What the kernel that adds so many parts up at most is compiled with, and its options."""
    return Constants(
        HEADS=num_heads, HEADS_PER_GROUP=num_heads // len(ranks),
        QUERIES=num_heads // (group_dim * len(ranks) // head_dim), HEAD_DIM=head_dim,
        RANK_STRIDE=max(ranks), PARTS=max(LEAST_PARTS, count), CHUNKS=cdiv(max(ranks), COMBINE_CHUNK), OUTPUTS=outputs,
        ALONE=alone, HAS_BIAS=has_bias, DIVISOR=divisor(ranks), EVEN=even_rank(ranks),
        num_warps=COMBINE_WARPS, launch_pdl=True,
    )  # fmt: skip
