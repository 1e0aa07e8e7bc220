"""Launches the score kernels: shapes of their programs, buffers, grids."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu.kernels.latent_scores.factors import ordered_factor, ordered_query, padded_rank
from palu.kernels.latent_scores.kernel import scores_kernel, turn_kernel, weight_kernel
from palu.kernels.latents import Latents, LatentProjection, Stretch, stretches
from palu.kernels.quantize import PackedLatents
from palu.kernels.rotation import Interpolation, Rotation

LOG2_E = 1.4426950408889634
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
TILE = 64
# Tokens per block where nothing is interpolated.
PLAIN_SPAN = 256
# kv heads, and query heads, whose scores one program computes at most.
MOST_KV, MOST_SLOTS = 4, 32
# Rows of the matrix product in `weight_kernel`.
WEIGHT_ROWS = 64
# Programs of the score kernel per multiprocessor.
PROGRAMS_PER_PROCESSOR = 2


class HeadBlocks(NamedTuple):
    """How query heads are shared out: blocks of `kv` kv heads with `query_slots` places for `queries` each.

    per_group: kv heads per group; slots: places per block in the scores; count: blocks in all.
    """

    per_group: int
    kv: int
    queries: int
    query_slots: int
    slots: int
    count: int


class Scores(NamedTuple):
    """What the score kernel leaves, with a stretch's tokens from a multiple of TILE on.

    output: scores as base-2 logarithms, or weights relative to their tile's peak, [rows, head blocks, slots, stored];
    stats: float32 [rows, head blocks, tiles, 3, slots], peaks, sums of weights and of weights times zero points.
    """

    output: Tensor
    stats: Tensor
    heads: HeadBlocks

    def by_head(self, num_heads: int, lengths: Sequence[int]) -> Tensor:
        """Scores [rows, num_heads, length] of stretches of those lengths."""
        heads, head = self.heads, torch.arange(num_heads, device=self.output.device)
        kv_head = head // heads.queries
        group, member = kv_head // heads.per_group, kv_head % heads.per_group
        block = group * triton.cdiv(heads.per_group, heads.kv) + member // heads.kv
        slot = member % heads.kv * heads.query_slots + head % heads.queries
        parts, start = [], 0
        for length in lengths:
            parts.append(self.output[:, block, slot, start : start + length])
            start += triton.cdiv(length, TILE) * TILE
        return torch.cat(parts, dim=-1)


class ValueSide(NamedTuple):
    """What the weights have to know of the values: how many heads share a group, and the latents themselves."""

    heads_per_group: int
    latents: Latents


class Side(NamedTuple):
    """Ranks, first latents, first bytes and first bytes of the high plane of every group, int32 on the device."""

    rank: Tensor
    offset: Tensor
    byte: Tensor
    plane: Tensor


def head_blocks(heads_per_group: int, groups: int, queries: int) -> HeadBlocks:
    """Blocks for groups of kv heads with `queries` query heads each."""
    query_slots = triton.next_power_of_2(queries)
    kv = max(1, min(MOST_KV, triton.next_power_of_2(heads_per_group), MOST_SLOTS // query_slots))
    count = triton.cdiv(heads_per_group, kv) * groups
    return HeadBlocks(heads_per_group, kv, queries, query_slots, max(8, kv * query_slots), count)


@functools.lru_cache(maxsize=4096)
def side_of(ranks: tuple[int, ...], bits: int, device: torch.device) -> Side:
    """The groups' places, made once per device. A plane of b bits begins behind ceil(width b / 8) bytes."""
    with torch.inference_mode(False):
        offsets = [sum(ranks[:group]) for group in range(len(ranks))]
        plane_bits = 2 if bits == 3 else bits
        bytes_ = [offset * plane_bits // 8 if bits < 16 else offset for offset in offsets]
        planes = [-(-sum(ranks) * 2 // 8) + offset // 8 if bits == 3 else 0 for offset in offsets]
        numbers = (ranks, offsets, bytes_, planes)
        return Side(*(torch.tensor(each, dtype=torch.int32, device=device) for each in numbers))


@functools.cache
def divisor(ranks: tuple[int, ...]) -> int:
    """The largest power of two, 16 to 128, of which all ranks are multiples."""
    return next(size for size in (128, 64, 32, 16) if all(rank % size == 0 for rank in ranks))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def layout(part: Stretch) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int, int], int, bool]:
    """Latents or codes, scales and zeros; strides per row and token; bits; whether zero points are stored."""
    if not isinstance(part, PackedLatents):
        return (part, part, part), (part.stride(0), part.stride(1), 0, 0), 16, False
    zeros = part.scales if part.zeros is None else part.zeros
    strides = (*part.codes.stride()[:2], *part.scales.stride()[:2])
    return (part.codes, part.scales, zeros), strides, part.quantization.bits, part.zeros is not None


def mask_kind(mask: Tensor | None) -> str:
    """What the kernels call a mask."""
    return "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"


def launch_scores(
    query: Tensor, latents: Latents, key: LatentProjection, rotation: Rotation | None, mask: Tensor | None,
    rows_per_latent: int, key_norm: torch.nn.Module | None = None, value: ValueSide | None = None,
) -> Scores:  # fmt: skip
    """Scores of queries [rows, num_heads, head_dim or, absorbed, width], which carry scaling and log2(e).

    mask: [rows or 1, length] or None; rows_per_latent: rows that read the same row of latents; value: the values that
    the weights are for, or None for the scores themselves.
    """
    rows, num_heads, width = query.shape
    groups = len(key.ranks)
    # Without a rotation all heads of a group read its latents alike: they are the queries of one kv head.
    kv_heads = groups if key.up is None else key.up.shape[0] * groups // width
    heads = head_blocks(kv_heads // groups, groups, num_heads // kv_heads)
    parts = stretches(latents)
    tiles = [triton.cdiv(part.shape[1], TILE) for part in parts]
    packed = value is not None and any(isinstance(part, PackedLatents) for part in stretches(value.latents))
    dtype = torch.float32 if value is None else torch.float16 if packed and query.dtype != torch.float32 else query.dtype
    output = query.new_empty(rows, heads.count, heads.slots, sum(tiles) * TILE, dtype=dtype)
    stats = query.new_empty(rows, heads.count, sum(tiles), 3, heads.slots, dtype=torch.float32)
    found = Scores(output, stats, heads)
    start = 0
    for index, part in enumerate(parts):
        visible = None if mask is None else mask.narrow(1, start, part.shape[1])
        turn = None if rotation is None else rotation.narrow(start, part.shape[1])
        values = None if value is None else ValueSide(value.heads_per_group, stretches(value.latents)[index])
        first_tile = sum(tiles[:index])
        _launch_part(query, part, key, turn, visible, rows_per_latent, key_norm, values, found, first_tile)
        start += part.shape[1]
    return found


def _launch_part(
    query: Tensor, part: Stretch, key: LatentProjection, rotation: Rotation | None, mask: Tensor | None,
    rows_per_latent: int, key_norm: torch.nn.Module | None, value: ValueSide | None, found: Scores, first_tile: int,
) -> None:  # fmt: skip
    """Scores of one stretch of tokens."""
    rows, num_heads, width = query.shape
    tensors, strides, bits, asymmetric = layout(part)
    heads, length, device, groups = found.heads, part.shape[1], query.device, len(key.ranks)
    dtype = torch.float16 if bits < 16 and query.dtype == torch.bfloat16 else query.dtype
    absorbed = key.up is None
    kv_heads = groups if absorbed else key.up.shape[0] * groups // width
    plain = absorbed or key_norm is not None
    interpolation = None if plain else rotation.interpolation(num_heads // kv_heads, dtype)
    mode = "absorbed" if absorbed else "exact" if interpolation is None else "interpolated"
    span = PLAIN_SPAN if interpolation is None else interpolation.span
    side, rank = side_of(tuple(key.ranks), bits, device), padded_rank(tuple(key.ranks))
    up = query if absorbed else key.up
    if bits < 16 and absorbed:
        query = ordered_query(query, rank, bits).to(dtype)
    elif bits < 16:
        up = ordered_factor(key, bits, dtype)
    cos = sin = starts = weights = biases = basis = up
    blocks = triton.cdiv(length, span)
    if interpolation is not None:
        starts, turns = rotation.turns(mask, length, interpolation, dtype, _launch_turns)
        weights, biases = _launch_weights(query, key, up, side, turns, interpolation, heads, bits, rank, dtype)
        cos, sin = rotation.fast_tables(interpolation.fast, dtype)
        basis = interpolation.basis
    # Few enough pieces per program to fill the GPU, few enough programs to load the up factor seldom.
    programs = max(1, PROGRAMS_PER_PROCESSOR * processors(device) // (heads.count * rows))
    pieces = next((n for n in (1, 2, 4, 8, 16) if n * TILE == span or blocks * n >= programs), span // TILE)
    values, value_strides, value_bits, value_asymmetric = (tensors, (0,) * 4, 16, False) if value is None else layout(
        value.latents
    )  # fmt: skip
    positions = side.rank if rotation is None else rotation.positions
    scores_kernel[(min(blocks * pieces, programs), heads.count, rows)](
        query, *tensors, up, up if key.bias is None else key.bias, up if key_norm is None else key_norm.weight, cos, sin,
        positions, up if rotation is None else rotation.frequencies.to(device, torch.float32), basis,
        up if mask is None else mask, starts, weights, biases, *values[1:], found.output, found.stats, *side,
        min(blocks * pieces, programs), length, blocks, *strides, 0 if absorbed else up.stride(0),
        *((0, 0) if interpolation is None else _strides(cos)), *((0, 0) if rotation is None else _strides(positions)),
        *((0, 0) if mask is None else _strides(mask)), *value_strides[2:],
        1 if interpolation is None else rows // starts.shape[0], found.output.shape[3], found.stats.shape[2],
        first_tile, 0.0 if key_norm is None else key_norm.variance_epsilon,
        MODE=mode, HEAD_DIM=width, HEADS=num_heads, KV_HEADS=kv_heads, HEADS_PER_GROUP=kv_heads // groups,
        KV=heads.kv, QUERIES=heads.queries, QUERY_SLOTS=heads.query_slots, SLOTS=heads.slots,
        QUERY_ROWS=rows_per_latent, FAST=16 if interpolation is None else interpolation.fast,
        COLUMNS=16 if interpolation is None else interpolation.columns, SPAN=span, PIECES=pieces, TILE=TILE, RANK=rank,
        QUERY_STRIDE=query.shape[-1], BITS=bits, ASYMMETRIC=asymmetric, MASK=mask_kind(mask),
        HAS_BIAS=key.bias is not None, HAS_NORM=key_norm is not None,
        VALUE_GROUP=num_heads if value is None else value.heads_per_group, VALUE_BITS=value_bits,
        VALUE_ASYMMETRIC=value_asymmetric, RAW=value is None, DTYPE=DTYPES[dtype],
        ASSEMBLY=dtype == torch.float16 and query.is_cuda, DIVISOR=divisor(tuple(key.ranks)), STAGES=2, num_warps=4,
    )  # fmt: skip


def _launch_turns(
    rotation: Rotation, mask: Tensor | None, length: int, interpolation: Interpolation, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Every block's first position and what turns the basis there; the same for all layers of a forward pass."""
    positions, device = rotation.positions, rotation.positions.device
    pairs, rows = rotation.frequencies.shape[0], max(positions.shape[0], 1 if mask is None else mask.shape[0])
    blocks, slow = triton.cdiv(length, interpolation.span), slow_pairs(pairs, interpolation)
    starts = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    turns = torch.empty(rows, blocks, interpolation.columns, 2, slow, dtype=dtype, device=device)
    turn_kernel[(blocks, rows)](
        positions, rotation.frequencies.to(device, torch.float32), interpolation.cos_basis, interpolation.sin_basis,
        positions if mask is None else mask, starts, turns, length, blocks, *_strides(positions),
        *((0, 0) if mask is None else _strides(mask)), PAIRS=pairs,
        ROWS_PER_POSITIONS=rows // positions.shape[0], FAST=interpolation.fast, SLOW=slow,
        COLUMNS=interpolation.columns, SPAN=interpolation.span, MASK=mask_kind(mask),
    )  # fmt: skip
    return starts, turns


def slow_pairs(pairs: int, interpolation: Interpolation) -> int:
    """Interpolated pairs, padded for the matrix units."""
    return max(16, triton.next_power_of_2(pairs - interpolation.fast))


def _launch_weights(
    query: Tensor, key: LatentProjection, up: Tensor, side: Side, turns: Tensor, interpolation: Interpolation,
    heads: HeadBlocks, bits: int, rank: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every block's matrix for the slow pairs, [rows, blocks, head blocks, columns, rank], and what a bias adds."""
    rows, num_heads, head_dim = query.shape
    kv_heads, blocks = up.shape[0] * len(key.ranks) // head_dim, turns.shape[1]
    wide = heads.kv * heads.query_slots * interpolation.columns
    weights = query.new_empty(rows, blocks, heads.count, wide, rank, dtype=dtype)
    biases = query.new_empty((rows, blocks, heads.count, wide) if key.bias is not None else (1,), dtype=torch.float32)
    tiles = triton.cdiv(blocks * interpolation.columns, WEIGHT_ROWS)
    programs = max(1, 2 * processors(query.device) // (num_heads * rows))
    together = triton.next_power_of_2(triton.cdiv(tiles, programs))
    weight_kernel[(triton.cdiv(tiles, together), num_heads, rows)](
        query, up, up if key.bias is None else key.bias, turns, weights, biases, side.rank, side.offset, blocks,
        up.stride(0), turns.stride(0), rows // turns.shape[0],
        HEAD_DIM=head_dim, HEADS=num_heads, KV_HEADS=kv_heads, HEADS_PER_GROUP=kv_heads // len(key.ranks), KV=heads.kv,
        QUERIES=heads.queries, QUERY_SLOTS=heads.query_slots, FAST=interpolation.fast,
        SLOW=slow_pairs(head_dim // 2, interpolation), COLUMNS=interpolation.columns, RANK=rank, ROWS=WEIGHT_ROWS,
        TILES=together, PACKED=bits < 16, HAS_BIAS=key.bias is not None, DTYPE=DTYPES[dtype],
    )  # fmt: skip
    return weights, biases


def _strides(table: Tensor) -> tuple[int, int]:
    """Strides per row and token of [rows or 1, length, ...]."""
    return (table.stride(0) if table.shape[0] > 1 else 0, table.stride(1))
