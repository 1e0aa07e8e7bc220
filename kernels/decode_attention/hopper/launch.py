"""Which calls Hopper's kernel takes, and its launch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from palu.kernels.decode_attention.hopper.combine import OUTPUTS as KERNEL_OUTPUTS
from palu.kernels.decode_attention.hopper.combine import WARPS as KERNEL_WARPS
from palu.kernels.decode_attention.hopper.combine import hopper_combine_kernel
from palu.kernels.decode_attention.hopper.factor import factor_of_codes
from palu.kernels.decode_attention.hopper.kernel import hopper_kernel
from palu.kernels.decode_attention.hopper.plans import (
    CHUNK,
    COLUMNS,
    MOST_PARTS,
    SLOW,
    TILE,
    Heads,
    Plan,
    heads_of,
    mode_of,
    padded_rank,
    parts_of,
    plans_for,
    scorers_of,
    weighers_of,
    whole_slots,
)
from palu.kernels.decode_attention.hopper.spans import spans_of
from palu.kernels.decode_attention.hopper.windows import COLUMNS as KERNEL_COLUMNS
from palu.kernels.decode_attention.hopper.windows import FAST as KERNEL_FAST
from palu.kernels.decode_attention.parts import Parts, combine
from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latent_scores.launch import LOG2_E
from palu.kernels.latent_scores.layout import (
    DTYPES,
    block_memory,
    divisor,
    even_rank,
    layout,
    mask_kind,
    processors,
    row_strides,
    side_of,
)
from palu.kernels.latent_scores.tables import lane_table
from palu.kernels.latents import LatentProjection, Latents, Stretch
from palu.kernels.quantize import PackedLatents
from palu.kernels.rotation import Rotation, Window
from palu.kernels.tuning import length_class, pick, searches

WINDOW_FAST, WINDOW_COLUMNS = KERNEL_FAST.value, KERNEL_COLUMNS.value
COMBINE_WARPS, OUTPUTS = KERNEL_WARPS.value, KERNEL_OUTPUTS.value
# Latents of a head, at least and at most, and parts at least that a program adds up.
LEAST_LATENTS, MOST_LATENTS, LEAST_PARTS = 128, 512, 16
# Tiles of a program from which on windows are worth their making.
LEAST_TILES = 8
# Pairs of keys with several queries that are rebuilt where the others are interpolated.
FAST = COLUMNS // 2
# Bits of codes that the kernel can make numbers of.
CODES = (8, 4)
# Registers of a thread that scores and of one that weighs values, by the mode, whether there are codes, and the groups
# of warps in all.
REGISTERS = {
    ("folded", False, 3): (200, 104), ("folded", True, 3): (184, 136),
    ("rotated", False, 3): (184, 136), ("rotated", True, 3): (168, 168),
    ("absorbed", False, 2): (240, 240), ("absorbed", True, 2): (240, 240), ("absorbed", True, 3): (152, 176),
    ("absorbed", True, 4): (104, 152),
}  # fmt: skip


def can_take(
    query: Tensor, key_latents: Latents, value_latents: Latents, key: LatentProjection, value: LatentProjection,
    key_norm: object,
) -> bool:  # fmt: skip
    """Whether the kernel takes this call, which `launch.can_take` does: 16 bits or codes, the same groups."""
    if query.dtype == torch.float32:
        return False
    bits = {_bits(latents, query.dtype) for latents in (key_latents, value_latents)}
    # Copies to shared memory are 16 bytes wide and convert nothing; Triton asks of what strides are multiples of 16.
    aligned = key.up is None or (_aligned(key.up) and key.up.dtype == query.dtype)
    if not (len(bits) == 1 and None not in bits and aligned and len(key.ranks) == len(value.ranks)):
        return False
    # Places of scales and of cosines are numbers of 32 bits.
    table = 1 if key.up is None else next_power_of_2(query.shape[3])
    if not 0 < key_latents.shape[1] * max(table, _stride(key_latents), _stride(value_latents)) < 1 << 31:
        return False
    (number,) = bits
    if any(rank * number % 128 for rank in (*key.ranks, *value.ranks)):
        return False
    if number < 16 and (key_latents.zeros is None) != (value_latents.zeros is None):
        return False
    _, num_heads, _, width = query.shape
    heads = heads_of(num_heads, len(key.ranks), None if key.up is None else key.up.shape[0] // width)
    ranks = (tuple(key.ranks), tuple(value.ranks))
    extras, memory = (key.bias is not None, key_norm is not None), block_memory(query.device)
    return bool(plans_for(heads, width, *ranks, number, memory, False, False, *extras))


def _bits(latents: Latents, dtype: torch.dtype) -> int | None:
    """Bits of latents that the kernel can read, None of others."""
    if isinstance(latents, PackedLatents):
        kind = latents.quantization
        # Symmetric codes' zero points are whole at any number of bits.
        taken = kind.bits in CODES and (kind.symmetric or kind.whole_zeros) and _aligned(latents.codes)
        return kind.bits if taken else None
    return 16 if isinstance(latents, Tensor) and latents.dtype == dtype and _aligned(latents) else None


def _stride(latents: Latents) -> int:
    """From a token's scales to the next one's."""
    return latents.scales.stride(1) if isinstance(latents, PackedLatents) else 0


def _aligned(numbers: Tensor) -> bool:
    rows = all(stride % 16 == 0 for stride in numbers.stride()[:-1])
    return rows and numbers.data_ptr() % 16 == 0 and numbers.stride(-1) == 1


class Call(NamedTuple):
    """What is computed: as the arguments of `launch`."""

    query: Tensor
    key_latents: Stretch
    value_latents: Stretch
    key: LatentProjection
    value: LatentProjection
    rotation: Rotation | None
    mask: Tensor | None
    rows_per_latent: int
    scaling: float
    key_norm: Any
    # Programs that share the heads of a group.
    shares: int = 1

    @property
    def extras(self) -> tuple[bool, bool]:
        """Whether keys have biases, and a norm."""
        return self.key.bias is not None, self.key_norm is not None

    @property
    def heads(self) -> Heads:
        """How the query heads lie."""
        kv = None if self.key.up is None else self.key.up.shape[0] // self.query.shape[2]
        return heads_of(self.query.shape[1], len(self.key.ranks) * self.shares, kv and kv // self.shares)

    @property
    def bits(self) -> int:
        """Bits of the latents."""
        return layout(self.key_latents)[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that are multiplied: codes become fp16, whatever the model's."""
        return self.query.dtype if self.bits == 16 else torch.float16

    def plans(self, windows: bool, all_of_them: bool) -> tuple[Plan, ...]:
        """As `plans_for`."""
        ranks, memory = (tuple(self.key.ranks), tuple(self.value.ranks)), block_memory(self.query.device)
        return plans_for(self.heads, self.query.shape[2], *ranks, self.bits, memory, windows, all_of_them, *self.extras)


class Tables(NamedTuple):
    """What weighs products by token, where the rows' tokens stand, and what windows are made with."""

    table: Tensor
    fast_table: Tensor
    spans: Tensor
    bases: Tensor
    basis: Tensor
    frequencies: Tensor


def launch(
    query: Tensor, key_latents: Stretch, value_latents: Stretch, key: LatentProjection, value: LatentProjection,
    rotation: Rotation | None, mask: Tensor | None, rows_per_latent: int, scaling: float, head_dim: int,
    key_norm: Any,
) -> Tensor:  # fmt: skip
    """The heads' outputs of queries [rows, num_heads, head_dim or, absorbed, width], as `parts.combine` returns them.

    mask: [rows or 1, length] or None; rows_per_latent: rows that read the same row of latents.
    """
    call = Call(query, key_latents, value_latents, key, value, rotation, mask, rows_per_latent, scaling, key_norm)
    (rows, num_heads, _), heads = query.shape, call.heads
    tiles = cdiv(key_latents.shape[1], TILE)
    others = len(key.ranks) * rows
    parts = parts_of(tiles, others, processors(query.device))
    # Asked for at any length, so that a short call before is enough where a step is captured in a CUDA graph.
    window = _window_of(call)
    if cdiv(tiles, parts) < LEAST_TILES:
        window = None
    if cdiv(tiles, parts) == 1 and can_share(call, 2 * others * cdiv(tiles, 2)):
        # Half of the factor to copy, and half of the parts to add up.
        call, parts = call._replace(shares=2), cdiv(tiles, 2)
        heads = call.heads
    weighers = weighers_of(heads.mode, call.bits)
    sums = query.new_empty(parts * weighers, rows, num_heads, max(value.ranks), dtype=torch.float32)
    found = Parts(sums, *query.new_empty(2, parts * weighers, rows, num_heads, dtype=torch.float32))
    _launch_best(call, window, _tables(call, window), parts, found)
    return _combine_early(found, value, query, head_dim)


def can_share(call: Call, programs: int) -> bool:
    """Whether two programs can share each group's heads, and so many of them run at a time."""
    if call.heads.mode != "rotated" or call.heads.kv % 2 == 1 or programs > processors(call.query.device):
        return False
    return bool(call._replace(shares=2).plans(False, False))


def _window_of(call: Call) -> Window | None:
    """In what windows of positions the call's keys can be interpolated, where that is faster."""
    # Several queries' numbers take longer to read than to multiply.
    numbers = call.bits == 16 and call.heads.mode != "folded"
    if numbers or call.heads.mode == "absorbed" or not call.plans(True, False):
        return None
    if call.heads.mode == "folded":
        return call.rotation.window(WINDOW_FAST, SLOW, WINDOW_COLUMNS, lanes=True)
    return call.rotation.window(FAST, COLUMNS - FAST, COLUMNS // call.heads.slots)


def _launch_best(call: Call, window: Window | None, tables: Tables, parts: int, found: Parts) -> None:
    """Launch with the best plan, of calls with windows for these: rows with gaps are few."""
    plans = call.plans(window is not None, searches())
    if searches():
        kinds = (call.heads, call.query.shape, tuple(call.key.ranks), tuple(call.value.ranks), call.bits, call.extras)
        shape_class = ("hopper", *kinds, call.query.dtype, mask_kind(call.mask), window and window.span)
        plan = pick(
            (*shape_class, length_class(call.key_latents.shape[1])), plans,
            lambda plan: _launch(plan, call, window, tables, parts, found), call.query.device,
        )  # fmt: skip
    else:
        plan = plans[0]
    _launch(plan, call, window, tables, parts, found)


def _tables(call: Call, window: Window | None) -> Tables:
    query, rotation = call.query, call.rotation
    if rotation is None:
        return Tables(*(query,) * 6)
    table = lane_table(rotation, call.dtype)
    if window is None:
        return Tables(table, *(query,) * 5)
    if call.heads.mode == "folded":
        fast_table = lane_table(rotation, torch.float16, WINDOW_FAST)
    else:
        fast_table = lane_table(rotation, call.dtype, FAST)
    spans = spans_of(rotation, call.mask, call.key_latents.shape[1], call.rows_per_latent, TILE)
    frequencies = rotation.frequencies.to(query.device, torch.float32)
    return Tables(table, fast_table, spans, window.bases, window.basis, frequencies)


def _launch(plan: Plan, call: Call, window: Window | None, tables: Tables, parts: int, found: Parts) -> None:
    """Launch with a plan, of calls with windows for these."""
    query, key_latents, value_latents, key, value, rotation, mask, rows_per_latent, scaling, key_norm, shares = call
    (rows, num_heads, width), heads = query.shape, call.heads
    absorbed, length, device = key.up is None, key_latents.shape[1], query.device
    groups = len(key.ranks) * call.shares
    ranks, value_ranks = tuple(key.ranks), tuple(value.ranks)
    (keys, key_parameters), key_strides, bits, asymmetric = layout(key_latents)
    (values, value_parameters), value_strides, _, _ = layout(value_latents)
    exact = plan if window is None else call.plans(False, False)[0]
    chunks = cdiv(max(value_ranks), CHUNK)
    weighers, whole = weighers_of(heads.mode, bits), whole_slots(heads, bits, chunks)
    scorers = scorers_of(heads.mode, weighers, whole)
    registers = REGISTERS[heads.mode, bits < 16, scorers + weighers]
    has_bias, has_norm = call.extras
    dtype = call.dtype
    rank, up, scaled = padded_rank(ranks, bits), query if absorbed else key.up, False
    if bits < 16 and not absorbed:
        up, power, scaled = factor_of_codes(call.key, rank, bits, dtype, heads.mode == "folded", any(call.extras))
        scaling *= power
    scaling *= LOG2_E * (1.0 if rotation is None else rotation.attention_scaling)
    side, value_side = side_of(ranks, 16, device), side_of(value_ranks, 16, device)
    hopper_kernel[(parts, groups, rows)](
        query, keys, values, up, key.bias if has_bias else query, key_norm.weight if has_norm else query,
        tables.table, tables.fast_table, query if mask is None else mask,
        key_parameters, value_parameters, *tables[2:], *found,
        side.rank, side.offset, value_side.rank, value_side.offset,
        length, *key_strides[:2], *value_strides[:2], *key_strides[2:], *value_strides[2:],
        0 if absorbed else up.stride(0), *((0, 0) if absorbed else row_strides(tables.table)),
        *((0, 0) if window is None else row_strides(tables.fast_table)),
        *((0, 0) if mask is None else row_strides(mask)), tables.spans.stride(0) if tables.spans.shape[0] > 1 else 0,
        query.stride(1), rows * num_heads, scaling, key_norm.variance_epsilon if has_norm else 0.0,
        MODE=heads.mode, KEY_STAGES=exact.key_stages, STEP=exact.step, VALUE_STAGES=exact.value_stages,
        SPAN=0 if window is None else window.span, SPAN_MODE=mode_of(heads, window is not None),
        SPAN_KEY_STAGES=plan.key_stages, SPAN_STEP=plan.step, SPAN_VALUE_STAGES=plan.value_stages, HELD=1 + plan.stays,
        GROUPS=groups, SHARES=shares, KV=heads.kv, QUERIES=heads.queries, QUERY_SLOTS=heads.query_slots,
        SLOTS=heads.slots, QUERY_ROWS=rows_per_latent, WIDTH=width, WIDE=next_power_of_2(width),
        RANK=rank, KEY_DIVISOR=divisor(ranks), CHUNKS=chunks, VALUE_DIVISOR=divisor(value_ranks),
        RANK_STRIDE=max(value_ranks), MASK=mask_kind(mask),
        DTYPE=DTYPES[dtype], TOGETHER=heads.together, COLUMNS=heads.columns, BITS=bits,
        ASYMMETRIC=asymmetric, SCORERS=scorers, WEIGHERS=weighers,
        SCORE_REGISTERS=registers[0], VALUE_REGISTERS=registers[1],
        WHOLE=whole, SCALED=scaled, HAS_BIAS=has_bias, HAS_NORM=has_norm,
        EVEN_KEYS=even_rank(ranks), EVEN_VALUES=even_rank(value_ranks),
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def _combine_early(parts: Parts, value: LatentProjection, query: Tensor, head_dim: int) -> Tensor:
    """As `parts.combine`, of parts that a launch makes which allows this one to begin before it ends."""
    rows, num_heads, _ = query.shape
    ranks, count = tuple(value.ranks), parts.sums.shape[0]
    fits = max(ranks) <= MOST_LATENTS and count <= MOST_PARTS and parts.sums.numel() < 1 << 31
    if value.up is None or not fits:
        return combine(parts, value, query, head_dim)
    side = side_of(ranks, 16, query.device)
    output = query.new_empty(rows, num_heads, head_dim)
    hopper_combine_kernel[(rows * num_heads, cdiv(head_dim, OUTPUTS))](
        *parts, value.up, value.up if value.bias is None else value.bias, output, side.rank, side.offset,
        count, rows * num_heads, value.up.stride(0),
        HEADS=num_heads, HEADS_PER_GROUP=num_heads // len(ranks),
        QUERIES=num_heads // (value.up.shape[0] * len(ranks) // head_dim), HEAD_DIM=head_dim,
        RANK_STRIDE=max(ranks), PARTS=max(LEAST_PARTS, next_power_of_2(count)),
        LATENTS=max(LEAST_LATENTS, next_power_of_2(max(ranks))),
        HAS_BIAS=value.bias is not None, DIVISOR=divisor(ranks), EVEN=even_rank(ranks),
        num_warps=COMBINE_WARPS, launch_pdl=True,
    )  # fmt: skip
    return output.view(rows, -1)
