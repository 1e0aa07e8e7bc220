"""Launches the score kernels: shapes of their programs, buffers, grids."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latent_scores.configs import EXACT_TILE, Config, configs_for
from palu.kernels.latent_scores.factors import PART, ordered_factor, ordered_query, padded_rank, word_order
from palu.kernels.latent_scores.kernel import scores_kernel
from palu.kernels.latent_scores.layout import (
    DTYPES,
    HeadBlocks,
    block_memory,
    divisor,
    head_blocks,
    layout,
    mask_kind,
    processors,
    row_strides,
    side_of,
)
from palu.kernels.latent_scores.tables import fast_table
from palu.kernels.latent_scores.weights import turn_kernel, weight_kernel
from palu.kernels.latents import LatentProjection, Latents, Stretch, stretches
from palu.kernels.quantize import PackedLatents
from palu.kernels.relaunch import relaunch
from palu.kernels.rotation import Interpolation, Rotation
from palu.kernels.tuning import length_class, pick, searches

LOG2_E = 1.4426950408889634
# Tokens that a program takes on at a time, and tokens per block where nothing is interpolated.
MOST_PIECE, PLAIN_SPAN = 2048, 1024
# Rows of the matrix product in `weight_kernel`, and its programs per multiprocessor.
WEIGHT_ROWS, WEIGHT_PROGRAMS = 64, 2
# Columns of fast pairs per head and product: of numbers, which are multiplied from shared memory, and of codes, which
# are multiplied from registers, at least so many.
NUMBERS_CHUNK, CODES_CHUNK = 32, 16
# What the matrix units add up at least.
LEAST_PRODUCT = 16


class Scores(NamedTuple):
    """What the score kernel leaves, with a stretch's tokens from a multiple of the piece on.

    scores: base-2 logarithms of weights, float32 [rows, head blocks, slots, stored]; piece: tokens per piece.
    """

    scores: Tensor
    piece: int
    heads: HeadBlocks

    def by_head(self, num_heads: int, lengths: Sequence[int]) -> Tensor:
        """Scores [rows, num_heads, length] of stretches of those lengths."""
        heads, head = self.heads, torch.arange(num_heads, device=self.scores.device)
        kv_head = head // heads.queries
        group, member = kv_head // heads.per_group, kv_head % heads.per_group
        block = group * cdiv(heads.per_group, heads.kv) + member // heads.kv
        slot = member % heads.kv * heads.query_slots + head % heads.queries
        parts, start = [], 0
        for length in lengths:
            parts.append(self.scores[:, block, slot, start : start + length])
            start += cdiv(length, self.piece) * self.piece
        return torch.cat(parts, dim=-1)


class Step(NamedTuple):
    """What all stretches of a call share: queries [rows, num_heads, width] and how they are scored."""

    query: Tensor
    key: LatentProjection
    key_norm: torch.nn.Module | None
    interpolation: Interpolation | None
    rows_per_latent: int
    scaling: float
    heads: HeadBlocks


def launch_scores(
    query: Tensor, latents: Latents, key: LatentProjection, rotation: Rotation | None, mask: Tensor | None,
    rows_per_latent: int, scaling: float, key_norm: torch.nn.Module | None = None,
) -> Scores:  # fmt: skip
    """Scores of queries [rows, num_heads, head_dim or, absorbed, width] times `scaling`, as base-2 logarithms.

    mask: [rows or 1, length] or None; rows_per_latent: rows that read the same row of latents.
    """
    rows, num_heads, width = query.shape
    groups = len(key.ranks)
    # Without a rotation all heads of a group read its latents alike: they are the queries of one kv head.
    kv_heads = groups if key.up is None else key.up.shape[0] * groups // width
    memory = block_memory(query.device)
    heads = head_blocks(kv_heads // groups, groups, num_heads // kv_heads, memory)
    parts = stretches(latents)
    interpolation = None
    if key.up is not None and key_norm is None and rotation.groups == 1:
        interpolation = rotation.interpolation(heads.queries, compute_dtype(query, parts))
    scaling *= LOG2_E * (1.0 if rotation is None else rotation.attention_scaling)
    step = Step(query, key, key_norm, interpolation, rows_per_latent, scaling, heads)
    rank = padded_rank(tuple(key.ranks))
    search = searches()
    fitting = [configs_for(part, rank, heads, interpolation, key.up is None, memory, search) for part in parts]
    if not search:
        return _launch_parts(step, parts, [configs[0] for configs in fitting], rotation, mask)
    # A search tries all configurations of the longest stretch with the first ones of the others.
    longest = max(range(len(parts)), key=lambda index: parts[index].shape[1])
    choices = [
        [config if index == longest else others[0] for index, others in enumerate(fitting)]
        for config in fitting[longest]
    ]
    kind = layout(parts[longest])[2:]
    shape_class = ("scores", heads, width, rank, rows, kind, interpolation is None, query.dtype, mask_kind(mask))
    chosen = pick(
        (*shape_class, length_class(latents.shape[1])), choices,
        lambda configs: _launch_parts(step, parts, configs, rotation, mask), query.device,
    )  # fmt: skip
    return _launch_parts(step, parts, chosen, rotation, mask)


def _launch_parts(
    step: Step, parts: Sequence[Stretch], configs: Sequence[tuple[Config, bool]], rotation: Rotation | None,
    mask: Tensor | None,
) -> Scores:  # fmt: skip
    """Scores of all stretches, each with a configuration of its own."""
    query, heads = step.query, step.heads
    rows, length = query.shape[0], sum(part.shape[1] for part in parts)
    config = max((config for config, _ in configs), key=lambda config: config.tile)
    programs = max(1, config.programs * processors(query.device) // (heads.count * rows))
    piece = piece_length(config.tile, length, programs)
    pieces = [cdiv(part.shape[1], piece) for part in parts]
    scores = query.new_empty(rows, heads.count, heads.slots, sum(pieces) * piece, dtype=torch.float32)
    found = Scores(scores, piece, heads)
    start = 0
    for index, part in enumerate(parts):
        length = part.shape[1]
        visible = None if mask is None else mask.narrow(1, start, length)
        turn = None if rotation is None else rotation.narrow(start, length)
        _launch_part(step, part, *configs[index], programs, turn, visible, found, sum(pieces[:index]))
        start += length
    return found


def compute_dtype(query: Tensor, parts: Sequence[Stretch]) -> torch.dtype:
    """What products are computed in: codes are exact, and unpacked fastest, in fp16."""
    packed = any(isinstance(part, PackedLatents) for part in parts)
    return torch.float16 if packed and query.dtype == torch.bfloat16 else query.dtype


def piece_length(tile: int, length: int, programs: int) -> int:
    """Tokens that a program takes at a time: less where that would leave programs without work."""
    piece = MOST_PIECE
    while piece > tile and cdiv(length, piece) < programs:
        piece //= 2
    return piece


def _launch_part(
    step: Step, part: Stretch, config: Config, keeps: bool, programs: int, rotation: Rotation | None,
    mask: Tensor | None, found: Scores, first_piece: int,
) -> None:  # fmt: skip
    """Scores of one stretch of tokens."""
    query, key, key_norm, interpolation, rows_per_latent, scaling, heads = step
    rows, num_heads, width = query.shape
    tensors, strides, bits, asymmetric = layout(part)
    length, device, groups = part.shape[1], query.device, len(key.ranks)
    dtype = compute_dtype(query, (part,))
    absorbed = key.up is None
    kv_heads = groups if absorbed else key.up.shape[0] * groups // width
    interpolated = "folded" if heads.queries == 1 else "shared"
    mode = "absorbed" if absorbed else "exact" if interpolation is None else interpolated
    span = PLAIN_SPAN if interpolation is None else interpolation.span
    side, rank = side_of(tuple(key.ranks), bits, device), padded_rank(tuple(key.ranks))
    up = query if absorbed else key.up
    if bits < 16 and absorbed:
        query = ordered_query(query, rank, bits).to(dtype)
    elif bits < 16:
        up = ordered_factor(key, rank, bits, dtype, word_order)
    table = starts = basis = up
    weights = Weights(up, up, up, up)
    blocks = cdiv(length, span)
    if interpolation is not None:
        starts, turns = rotation.turns(mask, length, interpolation, dtype, _launch_turns)
        weights = _launch_weights(step, part, up, rotation, mask, (starts, turns), found, first_piece)
        table = fast_table(rotation, interpolation.fast, dtype)
        basis = interpolation.basis
    pieces = cdiv(length, found.piece)
    positions = side.rank if rotation is None else rotation.positions_of(groups)
    relaunch(
        scores_kernel, (min(pieces, programs), heads.count, rows),
        query, *tensors, up, up if key.bias is None else key.bias, up if key_norm is None else key_norm.weight, table,
        positions, up if rotation is None else rotation.frequencies.to(device, torch.float32), basis,
        up if mask is None else mask, starts, *weights, found.scores, *side,
        min(pieces, programs), length, blocks, *strides, 0 if absorbed else up.stride(0),
        *((0, 0) if interpolation is None else row_strides(table)),
        *((0, 0, 0) if rotation is None else (*row_strides(positions), positions.stride(2))),
        *((0, 0) if mask is None else row_strides(mask)),
        1 if interpolation is None else rows // starts.shape[0], found.scores.shape[3],
        first_piece * found.piece, 0.0 if key_norm is None else key_norm.variance_epsilon, scaling,
        MODE=mode, HEAD_DIM=width, HEADS=num_heads, KV_HEADS=kv_heads, HEADS_PER_GROUP=kv_heads // groups,
        KV=heads.kv, QUERIES=heads.queries, QUERY_SLOTS=heads.query_slots, SLOTS=heads.slots,
        QUERY_ROWS=rows_per_latent, FAST=16 if interpolation is None else interpolation.fast,
        COLUMNS=16 if interpolation is None else interpolation.columns,
        CHUNK=_chunk(interpolation, bits, heads), SPAN=span, PIECE=found.piece, TILE=config.tile, RANK=rank,
        PART=min(PART, rank), KEPT=keeps, QUERY_STRIDE=query.shape[-1], BITS=bits,
        ASYMMETRIC=asymmetric, MASK=mask_kind(mask), HAS_BIAS=key.bias is not None, HAS_NORM=key_norm is not None,
        DTYPE=DTYPES[dtype],
        ASSEMBLY=dtype == torch.float16 and query.is_cuda, DIVISOR=divisor(tuple(key.ranks)), STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip


def _launch_turns(
    rotation: Rotation, mask: Tensor | None, length: int, interpolation: Interpolation, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Every block's first position and what turns the basis there; the same for all layers of a forward pass."""
    positions, device = rotation.positions, rotation.positions.device
    pairs, rows = rotation.frequencies.shape[0], max(positions.shape[0], 1 if mask is None else mask.shape[0])
    blocks, slow = cdiv(length, interpolation.span), slow_pairs(pairs, interpolation)
    starts = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    turns = torch.empty(rows, blocks, interpolation.columns, 2, slow, dtype=dtype, device=device)
    relaunch(
        turn_kernel, (blocks, rows),
        positions, rotation.frequencies.to(device, torch.float32), interpolation.cos_basis, interpolation.sin_basis,
        positions if mask is None else mask, starts, turns, length, blocks, *row_strides(positions),
        *((0, 0) if mask is None else row_strides(mask)), PAIRS=pairs,
        ROWS_PER_POSITIONS=rows // positions.shape[0], FAST=interpolation.fast, SLOW=slow,
        COLUMNS=interpolation.columns, SPAN=interpolation.span, MASK=mask_kind(mask),
    )  # fmt: skip
    return starts, turns


def _chunk(interpolation: Interpolation | None, bits: int, heads: HeadBlocks) -> int:
    """Columns of fast pairs per head and product; half of those of a block's heads meet queries in another product."""
    if interpolation is None or bits == 16:
        return NUMBERS_CHUNK
    return max(CODES_CHUNK, interpolation.columns if heads.queries == 1 else LEAST_PRODUCT * 2 // heads.kv)


class Weights(NamedTuple):
    """What latents are multiplied with, and what a bias adds: of slow pairs, for every block, and of folded fast ones.

    slow: [rows, blocks, head blocks, columns, rank]; fast: [rows, head blocks, columns, rank]; biases without rank.
    """

    slow: Tensor
    slow_biases: Tensor
    fast: Tensor
    fast_biases: Tensor


def slow_pairs(pairs: int, interpolation: Interpolation) -> int:
    """Interpolated pairs, padded for the matrix units."""
    return max(16, next_power_of_2(pairs - interpolation.fast))


def _launch_weights(
    step: Step, part: Stretch, up: Tensor, rotation: Rotation, mask: Tensor | None, starts_turns: tuple[Tensor, Tensor],
    found: Scores, first_piece: int,
) -> Weights:  # fmt: skip
    """The matrices of a stretch; scores of its blocks with gaps."""
    query, key, _, interpolation, rows_per_latent, scaling, _ = step
    rows, num_heads, head_dim = query.shape
    (starts, turns), dtype = starts_turns, compute_dtype(query, (part,))
    tensors, strides, bits, asymmetric = layout(part)
    side, rank, heads = side_of(tuple(key.ranks), bits, query.device), padded_rank(tuple(key.ranks)), found.heads
    kv_heads, blocks = up.shape[0] * len(key.ranks) // head_dim, turns.shape[1]
    wide = heads.kv * heads.query_slots * interpolation.columns
    fast = 2 * interpolation.fast * heads.kv if heads.queries == 1 else 0
    weights = Weights(
        query.new_empty(rows, blocks, heads.count, wide, rank, dtype=dtype),
        query.new_empty((rows, blocks, heads.count, wide) if key.bias is not None else (1,), dtype=torch.float32),
        query.new_empty(rows, heads.count, max(1, fast), rank, dtype=dtype),
        query.new_empty((rows, heads.count, max(1, fast)) if key.bias is not None else (1,), dtype=torch.float32),
    )
    tiles = cdiv(blocks * interpolation.columns, WEIGHT_ROWS)
    programs = max(1, WEIGHT_PROGRAMS * processors(query.device) // (num_heads * rows))
    together = cdiv(tiles, programs)
    relaunch(
        weight_kernel, (cdiv(tiles, together), num_heads, rows),
        query, *tensors, up, up if key.bias is None else key.bias, rotation.positions,
        rotation.frequencies.to(query.device, torch.float32), up if mask is None else mask, starts, turns,
        *weights, found.scores, *side, part.shape[1], blocks, *strides, up.stride(0), *row_strides(rotation.positions),
        *((0, 0) if mask is None else row_strides(mask)), turns.stride(0), rows // turns.shape[0], together,
        found.scores.shape[3],
        first_piece * found.piece, scaling,
        HEAD_DIM=head_dim, HEADS=num_heads, KV_HEADS=kv_heads, HEADS_PER_GROUP=kv_heads // len(key.ranks), KV=heads.kv,
        QUERIES=heads.queries, QUERY_SLOTS=heads.query_slots, FAST=interpolation.fast,
        SLOW=slow_pairs(head_dim // 2, interpolation), COLUMNS=interpolation.columns,
        CHUNK=_chunk(interpolation, bits, heads), SPAN=interpolation.span, RANK=rank,
        ROWS=WEIGHT_ROWS, SLOTS=heads.slots, QUERY_ROWS=rows_per_latent, TILE=EXACT_TILE, BITS=bits,
        ASYMMETRIC=asymmetric, MASK=mask_kind(mask), HAS_BIAS=key.bias is not None,
        ASSEMBLY=dtype == torch.float16 and query.is_cuda, DIVISOR=divisor(tuple(key.ranks)), DTYPE=DTYPES[dtype],
    )  # fmt: skip
    return weights
