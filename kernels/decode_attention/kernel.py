"""Triton kernels of decode attention over latents, split over the tokens (flash-decoding, arXiv 2311.01282).

The scores come from `palu.kernels.latent_scores`. `values_kernel` weighs the value latents of a part of the tokens by
their softmax weights relative to the part's largest score; `combine_kernel` adds up the parts and applies the up
factor. Packed latents are multiplied as codes, less the middle code `m`: `x = s (c - m - z)`, so the scale `s` joins
the score as a logarithm and the shift `z` meets the sum of the weights.
"""

import triton
import triton.language as tl

from palu.kernels.codes import first_of_pair, half_word, load_latents, load_pairs
from palu.kernels.latent_scores.tiles import load_scales

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


@triton.jit
def _softmax_weights(
    scores, at_scores, value_scales, at_scales, scales_t, token, ok, peak, total, shifts,
    BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Weights of a range of tokens [heads, tokens] relative to the largest score so far, and that with the sums so far.

    at_scores: [heads]; ok: whether a head's token exists. Also returns what sums over earlier ranges have to be
    multiplied with.
    """
    score = tl.load(scores + at_scores[:, None] + token[None, :], mask=ok, other=float("-inf"))
    scaled = score
    if BITS < 16:
        there = tl.max(ok.to(tl.int32), 0) > 0
        scale, shift = load_scales(value_scales, at_scales + token * scales_t, there, BITS, ASYMMETRIC)
        scaled = score + tl.log2(scale)[None, :]
    new = tl.maximum(peak, tl.max(scaled, 1) - HEADROOM)
    weight = tl.exp2(scaled - new[:, None])
    rounded = weight.to(dtype)
    before = tl.exp2(peak - new)
    if BITS < 16:
        weight = tl.exp2(score - new[:, None])
    total = total * before + tl.sum(weight, 1)
    if ASYMMETRIC:
        shifts = shifts * before + tl.sum(rounded.to(tl.float32) * shift[None, :], 1)
    return rounded, before, new, total, shifts


@triton.jit
def _spread(numbers, BLOCK: tl.constexpr):
    """Numbers of the heads in a block of BLOCK."""
    same = tl.arange(0, BLOCK)[:, None] == tl.arange(0, numbers.shape[0])[None, :]
    return tl.sum(tl.where(same, numbers[None, :], 0.0), 1)


@triton.jit(
    do_not_specialize=["length", "scales_b", "stored_from", "ranges", "first_part", "rows_heads"]
)  # fmt: skip
def values_kernel(
    scores, value_scales, latents, weights, sums, totals, peaks, rank_of, byte_of, plane_of, chunk_group, chunk_column,
    length, latents_b, latents_t, scales_b, scales_t, stored, stored_from, ranges, first_part, rows_heads,
    HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, HEAD_BLOCKS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, SOFTMAX_HEADS: tl.constexpr,
    KEY_GROUP: tl.constexpr, KV: tl.constexpr, QUERY_SLOTS: tl.constexpr, QUERIES: tl.constexpr,
    SLOTS: tl.constexpr, QUERY_ROWS: tl.constexpr, RANK_STRIDE: tl.constexpr, BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_RANK: tl.constexpr, TILE: tl.constexpr, RANGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`sum_t w_t x_t` of one value group's heads over a part of `ranges` times RANGE tokens, BLOCK_RANK latents of it.

    scores: as `scores_kernel` leaves them. weights: [parts, rows, chunks, SOFTMAX_HEADS, RANGE], this kernel's own.
    `sums`: float32 [parts, rows, HEADS, RANK_STRIDE]; `totals` (the sums of the weights) and `peaks` (what they are
    relative to, base-2 logarithms): float32 [parts, rows, HEADS].
    """
    chunk, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = DTYPE
    group, column = tl.load(chunk_group + chunk), tl.multiple_of(tl.load(chunk_column + chunk), 16)
    rank = tl.multiple_of(tl.load(rank_of + group), DIVISOR)
    byte = tl.multiple_of(tl.load(byte_of + group), DIVISOR * BITS // 8 if BITS < 16 else DIVISOR)
    if ASYMMETRIC:
        # Scales and zero points lie side by side, so rows of them start at whole words.
        scales_b = tl.multiple_of(scales_b, 2)
    # Where a head's scores lie: which block of kv heads of which key group, which slot.
    softmax_head = tl.arange(0, SOFTMAX_HEADS)
    there = softmax_head < HEADS_PER_GROUP
    head = group * HEADS_PER_GROUP + softmax_head
    kv_member, wanted = head % KEY_GROUP // QUERIES, head % QUERIES
    per_key_group: tl.constexpr = (KEY_GROUP // QUERIES + KV - 1) // KV
    slot = kv_member % KV * QUERY_SLOTS + wanted
    lane = row * HEAD_BLOCKS + head // KEY_GROUP * per_key_group + kv_member // KV
    at_scores = (lane * SLOTS + slot).to(tl.int64) * stored + stored_from
    at_row = row // QUERY_ROWS
    at_scales = at_row * scales_b + group * (2 if ASYMMETRIC else 1)
    first = part * ranges * RANGE
    limit = tl.minimum(length, first + ranges * RANGE)

    member = tl.arange(0, BLOCK_HEADS)
    heads_ok = member < HEADS_PER_GROUP
    inside = tl.arange(0, TILE)
    first_source = latents + at_row.to(tl.int64) * latents_b + byte
    first_plane = latents + at_row.to(tl.int64) * latents_b + tl.load(plane_of + group)
    within = (inside * latents_t)[:, None]
    everything = (inside >= 0)[:, None]
    program = (part * tl.num_programs(2) + row) * tl.num_programs(0) + chunk
    own_weights = weights + program.to(tl.int64) * (SOFTMAX_HEADS * RANGE)
    at_weights = own_weights + member[:, None] * RANGE + inside[None, :]
    range_token = tl.arange(0, RANGE)

    peak = tl.full((SOFTMAX_HEADS,), LOWEST, tl.float32)
    total, shifts = tl.zeros((SOFTMAX_HEADS,), tl.float32), tl.zeros((SOFTMAX_HEADS,), tl.float32)
    summed = tl.zeros((BLOCK_HEADS, BLOCK_RANK), tl.float32)
    for begin in tl.range(first, limit, RANGE, num_stages=1):
        token = begin + range_token
        ok = there[:, None] & (token < limit)[None, :]
        range_weights, before, peak, total, shifts = _softmax_weights(
            scores, at_scores, value_scales, at_scales, scales_t, token, ok, peak, total, shifts, BITS, ASYMMETRIC,
            dtype,
        )  # fmt: skip
        # Other threads still read the weights of the range before.
        tl.debug_barrier()
        tl.store(own_weights + softmax_head[:, None] * RANGE + range_token[None, :], range_weights)
        tl.debug_barrier()
        summed *= _spread(before, BLOCK_HEADS)[:, None]
        length_here = tl.minimum(limit - begin, RANGE)
        for tile in tl.range(0, length_here // TILE, num_stages=STAGES):
            tile_start = tl.cast(begin + tile * TILE, tl.int64) * latents_t
            weight = tl.load(at_weights + tile * TILE, mask=heads_ok[:, None], other=0.0)
            summed = _add_tile(
                summed, weight, first_source + tile_start + within, first_plane + tile_start + within, everything,
                column, rank, BITS, BLOCK_RANK, ASSEMBLY, dtype,
            )  # fmt: skip
        if length_here % TILE > 0:
            tile = length_here // TILE
            tile_start = tl.cast(begin + tile * TILE, tl.int64) * latents_t
            weight = tl.load(at_weights + tile * TILE, mask=heads_ok[:, None], other=0.0)
            token_ok = (tile * TILE + inside < length_here)[:, None]
            summed = _add_tile(
                summed, weight, first_source + tile_start + within, first_plane + tile_start + within, token_ok,
                column, rank, BITS, BLOCK_RANK, ASSEMBLY, dtype,
            )  # fmt: skip
    at = (first_part + part) * rows_heads + row * HEADS + group * HEADS_PER_GROUP
    tl.store(totals + at + softmax_head, total, mask=there)
    tl.store(peaks + at + softmax_head, peak, mask=there)
    out = sums + (at + member)[:, None].to(tl.int64) * RANK_STRIDE
    latent = tl.arange(0, BLOCK_RANK)
    if BITS < 16:
        half: tl.constexpr = BLOCK_RANK // 2
        latent = first_of_pair(BLOCK_RANK, BITS, latent % half) + latent // half * half_word(BITS)
    if ASYMMETRIC:
        summed -= _spread(shifts, BLOCK_HEADS)[:, None]
    latent += column
    tl.store(out + latent[None, :], summed, mask=heads_ok[:, None] & (latent < rank)[None, :])


@triton.jit(do_not_specialize=["parts", "rows_heads"])
def combine_kernel(
    sums, totals, peaks, up, bias, output, rank_of, offset_of, parts, rows_heads, up_stride,
    HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr,
    RANK_STRIDE: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    CHUNKS: tl.constexpr, HAS_UP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One head's mean latents: the ranges' sums over their weights; with an up factor, BLOCK_OUT of its outputs.

    output: [rows, HEADS, HEAD_DIM], or without an up factor [rows, HEADS, RANK_STRIDE].
    """
    row_head, piece = tl.program_id(0), tl.program_id(1)
    head = row_head % HEADS
    group = head // HEADS_PER_GROUP
    rank, offset = tl.load(rank_of + group), tl.load(offset_of + group)
    part = tl.arange(0, BLOCK_PARTS)
    peak = tl.full((), LOWEST, tl.float32)
    for begin in range(0, parts, BLOCK_PARTS):
        at = (begin + part) * rows_heads + row_head
        peak = tl.maximum(peak, tl.max(tl.load(peaks + at, mask=begin + part < parts, other=LOWEST), 0))
    weight = tl.zeros((BLOCK_PARTS,), tl.float32)
    for begin in range(0, parts, BLOCK_PARTS):
        at = (begin + part) * rows_heads + row_head
        ok = begin + part < parts
        share = tl.exp2(tl.load(peaks + at, mask=ok, other=LOWEST) - peak)
        weight += share * tl.load(totals + at, mask=ok, other=0.0)
    inverse = 1.0 / tl.maximum(tl.sum(weight, 0), 1e-30)
    if HAS_UP:
        out = piece * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        out_ok = out < HEAD_DIM
        dim = head // QUERIES % (HEADS_PER_GROUP // QUERIES) * HEAD_DIM + out
        result = tl.zeros((BLOCK_OUT,), tl.float32)
        if HAS_BIAS:
            result += tl.load(bias + head // QUERIES * HEAD_DIM + out, mask=out_ok, other=0.0).to(tl.float32)
    # Unrolled, so that all loads can be under way at once.
    for chunk in tl.static_range(CHUNKS if HAS_UP else 1):
        latent = (chunk if HAS_UP else piece) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        total = tl.zeros((BLOCK_PARTS, BLOCK_RANK), tl.float32)
        for begin in range(0, parts, BLOCK_PARTS):
            at = (begin + part) * rows_heads + row_head
            part_ok = begin + part < parts
            share = tl.exp2(tl.load(peaks + at, mask=part_ok, other=LOWEST) - peak)
            found = tl.load(
                sums + at[:, None].to(tl.int64) * RANK_STRIDE + latent[None, :],
                mask=part_ok[:, None] & (latent < rank)[None, :], other=0.0,
            )  # fmt: skip
            total += found * share[:, None]
        mean = tl.sum(total, 0) * inverse
        if HAS_UP:
            both_ok = out_ok[:, None] & (latent < rank)[None, :]
            factor = tl.load(up + (dim * up_stride)[:, None] + offset + latent[None, :], mask=both_ok, other=0.0)
            result += tl.sum(factor.to(tl.float32) * mean[None, :], 1)
        else:
            at_out = output + row_head * RANK_STRIDE + latent
            tl.store(at_out, mean.to(output.dtype.element_ty), mask=latent < rank)
    if HAS_UP:
        tl.store(output + row_head * HEAD_DIM + out, result.to(output.dtype.element_ty), mask=out_ok)
