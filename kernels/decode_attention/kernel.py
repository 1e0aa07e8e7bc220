"""Triton kernels of decode attention over latents, split over the tokens (flash-decoding, arXiv 2311.01282).

The scores come from `palu.kernels.latent_scores`. `softmax_kernel` makes weights of them, relative to the largest of
a part of the tokens; `values_kernel` weighs the part's value latents; `combine_kernel` adds up the parts and applies
the up factor. Packed latents are multiplied as codes, less the middle code `m`: `x = s (c - m - z)`, so the scale `s`
joins the score as a logarithm and the shift `z` meets the sum of the weights.
"""

import triton
import triton.language as tl

from palu.kernels.codes import first_of_pair, half_word, load_latents, load_pairs
from palu.kernels.latent_scores.tiles import load_scale_words

LOWEST: tl.constexpr = tl.constexpr(-1e30)
# Weights are at most 2 ** HEADROOM, so that fp16 holds small ones with all its digits.
HEADROOM: tl.constexpr = tl.constexpr(14.0)


@triton.jit
def _add_tile(
    total, weights, source, plane, ok, column, rank,
    BITS: tl.constexpr, BLOCK_RANK: tl.constexpr, ASSEMBLY: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Add one tile of tokens. The first of all pairs of codes come before the second, so that none has to move."""
    if BITS == 16:
        x = load_latents(source, plane, ok, column, rank, dtype, BITS, BLOCK_RANK, ASSEMBLY)
    else:
        first, second = load_pairs(source, plane, ok, column, rank, dtype, BITS, BLOCK_RANK, ASSEMBLY)
        x = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (source.shape[0], BLOCK_RANK))
    # Beside codes numbers keep the dtype of the model, which need not be that of the weights.
    return tl.dot(weights.to(x.dtype), x, total, input_precision="ieee")


@triton.jit(
    do_not_specialize=["length", "scales_b", "first_tile", "part_tiles", "first_part", "rows_heads"]
)  # fmt: skip
def softmax_kernel(
    scores, value_scales, weights, totals, peaks, shifts,
    length, scales_b, scales_t, stored, first_tile, part_tiles, first_part, rows_heads,
    HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, HEAD_BLOCKS: tl.constexpr, KEY_GROUP: tl.constexpr,
    KV: tl.constexpr, QUERY_SLOTS: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
    QUERY_ROWS: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, TILE: tl.constexpr, RANGE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Softmax weights of AT_ONCE heads of a value group and part of the tokens, relative to the part's largest score.

    scores: as `scores_kernel` leaves them. weights: [rows, HEADS, stored]; float32 [parts, rows, HEADS]: totals (the
    sums of the weights), peaks (what they are relative to, base-2 logarithms), shifts (sums with the values' zero
    points).
    """
    part, head_block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    per_group: tl.constexpr = (HEADS_PER_GROUP + AT_ONCE - 1) // AT_ONCE
    group, member = head_block // per_group, head_block % per_group * AT_ONCE + tl.arange(0, AT_ONCE)
    there = member < HEADS_PER_GROUP
    head = group * HEADS_PER_GROUP + member
    # Where a head's scores lie: which block of kv heads of which key group, which slot.
    kv_member, wanted = head % KEY_GROUP // QUERIES, head % QUERIES
    per_key_group: tl.constexpr = (KEY_GROUP // QUERIES + KV - 1) // KV
    lane = row * HEAD_BLOCKS + head // KEY_GROUP * per_key_group + kv_member // KV
    slot = kv_member % KV * QUERY_SLOTS + wanted
    token = part * part_tiles * TILE + tl.arange(0, RANGE)
    # Rows are stored in whole tiles, so that loads and stores can be wide.
    kept = (token < (part + 1) * part_tiles * TILE) & (token < tl.cdiv(length, TILE) * TILE)
    ok = kept & (token < length)
    kept = kept[None, :] & there[:, None]
    at = (first_tile * TILE + token)[None, :]
    score = tl.load(scores + ((lane * SLOTS + slot).to(tl.int64) * stored)[:, None] + at, mask=kept, other=0.0)
    score = tl.where(ok[None, :], score, float("-inf"))
    scaled = score
    if BITS < 16:
        at_scales = row // QUERY_ROWS * scales_b + token * scales_t + group * (2 if ASYMMETRIC else 1)
        scale, shift = load_scale_words(value_scales, at_scales, ok, BITS, ASYMMETRIC)
        # Scales of hidden tokens may be anything.
        scaled = tl.where(score > float("-inf"), score + tl.log2(scale)[None, :], score)
    peak = tl.maximum(tl.max(scaled, 1) - HEADROOM, LOWEST)
    weight = tl.exp2(scaled - peak[:, None])
    rounded = weight.to(weights.dtype.element_ty)
    tl.store(weights + ((row * HEADS + head).to(tl.int64) * stored)[:, None] + at, rounded, mask=kept)
    out = (first_part + part) * rows_heads + row * HEADS + head
    tl.store(peaks + out, peak, mask=there)
    tl.store(totals + out, tl.sum(weight if BITS == 16 else tl.exp2(score - peak[:, None]), 1), mask=there)
    if ASYMMETRIC:
        tl.store(
            shifts + out, tl.sum(tl.where(weight > 0, rounded.to(tl.float32) * shift[None, :], 0.0), 1), mask=there
        )


@triton.jit(do_not_specialize=["length", "first_tile", "part_tiles", "first_part", "rows_heads"])
def values_kernel(
    weights, latents, sums, peaks, shifts, rank_of, byte_of, plane_of, chunk_group, chunk_column,
    length, latents_b, latents_t, stored, first_tile, part_tiles, first_part, rows_heads,
    HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, BLOCK_HEADS: tl.constexpr, QUERY_ROWS: tl.constexpr,
    RANK_STRIDE: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr, DIVISOR: tl.constexpr, BLOCK_RANK: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`sum_t w_t x_t` of one value group's heads over part_tiles * TILE tokens, BLOCK_RANK latents of the group.

    weights, peaks, shifts: as `softmax_kernel` leaves them. sums: float32 [parts, rows, HEADS, RANK_STRIDE].
    """
    chunk, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = DTYPE
    group, column = tl.load(chunk_group + chunk), tl.multiple_of(tl.load(chunk_column + chunk), 16)
    rank = tl.multiple_of(tl.load(rank_of + group), DIVISOR)
    byte = tl.multiple_of(tl.load(byte_of + group), DIVISOR * BITS // 8 if BITS < 16 else DIVISOR)
    member, inside = tl.arange(0, BLOCK_HEADS), tl.arange(0, TILE)
    heads_ok = member < HEADS_PER_GROUP
    head = row * HEADS + group * HEADS_PER_GROUP + member
    first = part * part_tiles * TILE
    at = (first_part + part) * rows_heads + head
    # A part that is hidden from all heads is not read, such as what a cache of fixed capacity has not filled yet.
    seen = tl.max(tl.load(peaks + at, mask=heads_ok, other=LOWEST), 0) > LOWEST
    here = tl.where(seen, tl.minimum(length - first, part_tiles * TILE), 0)
    at_row = row // QUERY_ROWS
    start = at_row.to(tl.int64) * latents_b + first.to(tl.int64) * latents_t
    source, plane = latents + start + byte, latents + start + tl.load(plane_of + group)
    within = (inside * latents_t)[:, None]
    at_weights = weights + head[:, None].to(tl.int64) * stored + (first_tile * TILE + first + inside[None, :])
    summed = tl.zeros((BLOCK_HEADS, BLOCK_RANK), tl.float32)
    everything = (inside >= 0)[:, None]
    for tile in tl.range(0, here // TILE, num_stages=STAGES):
        at_tile = tl.cast(tile * TILE, tl.int64) * latents_t
        weight = tl.load(at_weights + tile * TILE, mask=heads_ok[:, None], other=0.0)
        summed = _add_tile(
            summed, weight, source + at_tile + within, plane + at_tile + within, everything, column, rank, BITS,
            BLOCK_RANK, ASSEMBLY, dtype,
        )  # fmt: skip
    if here % TILE > 0:
        tile = here // TILE
        at_tile = tl.cast(tile * TILE, tl.int64) * latents_t
        ok = tile * TILE + inside < here
        weight = tl.load(at_weights + tile * TILE, mask=heads_ok[:, None] & ok[None, :], other=0.0)
        summed = _add_tile(
            summed, weight, source + at_tile + within, plane + at_tile + within, ok[:, None], column, rank, BITS,
            BLOCK_RANK, ASSEMBLY, dtype,
        )  # fmt: skip
    latent = tl.arange(0, BLOCK_RANK)
    if BITS < 16:
        half: tl.constexpr = BLOCK_RANK // 2
        latent = first_of_pair(BLOCK_RANK, BITS, latent % half) + latent // half * half_word(BITS)
    if ASYMMETRIC:
        summed -= tl.load(shifts + at, mask=heads_ok, other=0.0)[:, None]
    latent += column
    out = sums + at[:, None].to(tl.int64) * RANK_STRIDE + latent[None, :]
    tl.store(out, summed, mask=heads_ok[:, None] & (latent < rank)[None, :])


@triton.jit
def _part_sums(sums, part, parts, rows_heads, row_head, latent, rank, RANK_STRIDE: tl.constexpr):
    """Sums of some parts and latents of a head, zero where there are none."""
    at = (part * rows_heads + row_head)[:, None].to(tl.int64) * RANK_STRIDE + latent[None, :]
    return tl.load(sums + at, mask=(part < parts)[:, None] & (latent < rank)[None, :], other=0.0)


@triton.jit(do_not_specialize=["parts", "rows_heads"])
def combine_kernel(
    sums, totals, peaks, up, bias, output, rank_of, offset_of, parts, rows_heads, up_stride,
    HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr,
    RANK_STRIDE: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_PARTS: tl.constexpr, PASSES: tl.constexpr,
    AHEAD: tl.constexpr, BLOCK_OUT: tl.constexpr, CHUNKS: tl.constexpr, HAS_TOTALS: tl.constexpr,
    HAS_UP: tl.constexpr, HAS_BIAS: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """One head's mean latents: the ranges' sums over their weights; with an up factor, BLOCK_OUT of its outputs.

    HAS_TOTALS: else the weights of every range add up to one.

    output: [rows, HEADS, HEAD_DIM], or without an up factor [rows, HEADS, RANK_STRIDE].
    """
    row_head, piece = tl.program_id(0), tl.program_id(1)
    head = row_head % HEADS
    group = head // HEADS_PER_GROUP
    rank = tl.multiple_of(tl.load(rank_of + group), DIVISOR)
    offset = tl.multiple_of(tl.load(offset_of + group), DIVISOR)
    part = tl.arange(0, BLOCK_PARTS)
    # All that the first pass needs is asked for before anything waits.
    found, factors = (), ()
    for chunk in tl.static_range((CHUNKS if HAS_UP else 1) if AHEAD else 0):
        latent = (chunk if HAS_UP else piece) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        found = found + (_part_sums(sums, part, parts, rows_heads, row_head, latent, rank, RANK_STRIDE),)
    if HAS_UP:
        out = piece * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        out_ok = out < HEAD_DIM
        dim = head // QUERIES % (HEADS_PER_GROUP // QUERIES) * HEAD_DIM + out
        at_up = up + (dim * up_stride)[:, None] + offset
        for chunk in tl.static_range(CHUNKS if AHEAD else 0):
            latent = chunk * BLOCK_RANK + tl.arange(0, BLOCK_RANK)[None, :]
            factors = factors + (tl.load(at_up + latent, mask=out_ok[:, None] & (latent < rank), other=0.0),)
    peak = tl.full((), LOWEST, tl.float32)
    for begin in tl.static_range(0, PASSES * BLOCK_PARTS, BLOCK_PARTS):
        at = (begin + part) * rows_heads + row_head
        peak = tl.maximum(peak, tl.max(tl.load(peaks + at, mask=begin + part < parts, other=LOWEST), 0))
    weight = tl.zeros((BLOCK_PARTS,), tl.float32)
    for begin in tl.static_range(0, PASSES * BLOCK_PARTS, BLOCK_PARTS):
        at = (begin + part) * rows_heads + row_head
        ok = begin + part < parts
        share = tl.exp2(tl.load(peaks + at, mask=ok, other=LOWEST) - peak)
        weight += share * (tl.load(totals + at, mask=ok, other=0.0) if HAS_TOTALS else ok.to(tl.float32))
    inverse = 1.0 / tl.maximum(tl.sum(weight, 0), 1e-30)
    if HAS_UP:
        result = tl.zeros((BLOCK_OUT,), tl.float32)
        if HAS_BIAS:
            result += tl.load(bias + head // QUERIES * HEAD_DIM + out, mask=out_ok, other=0.0).to(tl.float32)
    for chunk in tl.static_range(CHUNKS if HAS_UP else 1):
        latent = (chunk if HAS_UP else piece) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        total = tl.zeros((BLOCK_PARTS, BLOCK_RANK), tl.float32)
        for begin in tl.static_range(0, PASSES * BLOCK_PARTS, BLOCK_PARTS):
            at = (begin + part) * rows_heads + row_head
            share = tl.exp2(tl.load(peaks + at, mask=begin + part < parts, other=LOWEST) - peak)
            if AHEAD and begin == 0:
                several = found[chunk]
            else:
                several = _part_sums(sums, begin + part, parts, rows_heads, row_head, latent, rank, RANK_STRIDE)
            total += several * share[:, None]
        mean = tl.sum(total, 0) * inverse
        if HAS_UP:
            if AHEAD:
                factor = factors[chunk]
            else:
                both_ok = out_ok[:, None] & (latent < rank)[None, :]
                factor = tl.load(at_up + latent[None, :], mask=both_ok, other=0.0)
            result += tl.sum(factor.to(tl.float32) * mean[None, :], 1)
        else:
            at_out = output + row_head * RANK_STRIDE + latent
            tl.store(at_out, mean.to(output.dtype.element_ty), mask=latent < rank)
    if HAS_UP:
        tl.store(output + row_head * HEAD_DIM + out, result.to(output.dtype.element_ty), mask=out_ok)
