"""Triton kernels of decode attention over latents, split over the tokens (flash-decoding, arXiv 2311.01282).

The scores come from `palu.kernels.latent_scores`. `values_kernel` weighs the value latents of a range of tokens by
their softmax weights relative to the range's largest score; `combine_kernel` adds up the ranges and applies the up
factor. Packed latents are multiplied as codes, less the middle code `m`: `x = s (c - m - z)`, so the scale `s`
multiplies the weights and the shift `z` meets their sum.
"""

import triton
import triton.language as tl

from palu.kernels.codes import first_of_pair, half_word, load_latents, load_pairs

LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def _weighed(
    total, weights, factor, source, plane, ok, column, rank,
    BITS: tl.constexpr, BLOCK_RANK: tl.constexpr, ASSEMBLY: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Add one tile of tokens. The first of all pairs of codes come before the second, so that none has to move."""
    if BITS == 16:
        x = load_latents(source, plane, ok, column, rank, dtype, BITS, BLOCK_RANK, ASSEMBLY)
    else:
        first, second = load_pairs(source, plane, ok, column, rank, dtype, BITS, BLOCK_RANK, ASSEMBLY)
        x = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (source.shape[0], BLOCK_RANK))
    # Beside codes numbers keep the dtype of the model, which need not be that of the weights.
    return tl.dot((weights * factor[:, None]).to(x.dtype), x, total, input_precision="ieee")


@triton.jit(do_not_specialize=["length", "pieces", "first_piece", "pieces_per_part", "first_part", "rows_heads"])
def values_kernel(
    weights, stats, latents, sums, totals, range_peaks, rank_of, byte_of, plane_of, chunk_group, chunk_column,
    length, latents_b, latents_t, stored, pieces, first_piece, pieces_per_part, first_part, rows_heads,
    HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, HEAD_BLOCKS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    KEY_GROUP: tl.constexpr, KV: tl.constexpr, QUERY_SLOTS: tl.constexpr, QUERIES: tl.constexpr,
    SLOTS: tl.constexpr, QUERY_ROWS: tl.constexpr, RANK_STRIDE: tl.constexpr, BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_RANK: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr, BLOCK_PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`sum_t w_t x_t` of one value group's heads over `pieces_per_part` pieces of tokens and BLOCK_RANK of its latents.

    Weights are relative to the largest score of their piece and turned to the range's here. `sums`: float32 [parts,
    rows, HEADS, RANK_STRIDE]; `totals` (the sums of the weights) and `range_peaks`: float32 [parts, rows, HEADS].
    """
    chunk, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = DTYPE
    group, column = tl.load(chunk_group + chunk), tl.multiple_of(tl.load(chunk_column + chunk), 16)
    rank = tl.multiple_of(tl.load(rank_of + group), DIVISOR)
    byte = tl.multiple_of(tl.load(byte_of + group), DIVISOR * BITS // 8 if BITS < 16 else DIVISOR)
    member = tl.arange(0, BLOCK_HEADS)
    heads_ok = member < HEADS_PER_GROUP
    head = group * HEADS_PER_GROUP + member
    # Where a head's weights lie: which block of kv heads of which key group, which slot.
    kv_member, wanted = head % KEY_GROUP // QUERIES, head % QUERIES
    per_key_group: tl.constexpr = (KEY_GROUP // QUERIES + KV - 1) // KV
    slot = kv_member % KV * QUERY_SLOTS + wanted
    lane = row * HEAD_BLOCKS + head // KEY_GROUP * per_key_group + kv_member // KV
    first = part * pieces_per_part
    last = tl.minimum(first + pieces_per_part, tl.cdiv(length, PIECE))
    at_stats = stats + (lane * pieces + first_piece) * (3 * SLOTS) + slot
    peak = tl.full((BLOCK_HEADS,), LOWEST, tl.float32)
    for begin in tl.range(first, last, BLOCK_PIECES, num_stages=1):
        piece = begin + tl.arange(0, BLOCK_PIECES)
        ok = (piece < last)[:, None] & heads_ok[None, :]
        found = tl.load(at_stats[None, :] + piece[:, None] * (3 * SLOTS), mask=ok, other=LOWEST)
        peak = tl.maximum(peak, tl.max(found, 0))
    total, shifts = tl.zeros((BLOCK_HEADS,), tl.float32), tl.zeros((BLOCK_HEADS,), tl.float32)
    for begin in tl.range(first, last, BLOCK_PIECES, num_stages=1):
        piece = begin + tl.arange(0, BLOCK_PIECES)
        ok = (piece < last)[:, None] & heads_ok[None, :]
        at = at_stats[None, :] + piece[:, None] * (3 * SLOTS)
        factor = tl.exp2(tl.load(at, mask=ok, other=LOWEST) - peak[None, :])
        total += tl.sum(factor * tl.load(at + SLOTS, mask=ok, other=0.0), 0)
        if ASYMMETRIC:
            shifts += tl.sum(factor * tl.load(at + 2 * SLOTS, mask=ok, other=0.0), 0)

    summed = tl.zeros((BLOCK_HEADS, BLOCK_RANK), tl.float32)
    at_row = row // QUERY_ROWS
    inside = tl.arange(0, TILE)
    first_source = latents + at_row.to(tl.int64) * latents_b + byte
    first_plane = latents + at_row.to(tl.int64) * latents_b + tl.load(plane_of + group)
    at_weights = weights + (lane * SLOTS + slot)[:, None].to(tl.int64) * stored + inside[None, :]
    at_weights += first_piece * PIECE
    within = (inside * latents_t)[:, None]
    first_tile, last_tile = first * (PIECE // TILE), tl.minimum(last * (PIECE // TILE), tl.cdiv(length, TILE))
    full = tl.minimum(last_tile, length // TILE)
    everything = (inside >= 0)[:, None]
    following = tl.load(at_stats + first * (3 * SLOTS), mask=heads_ok, other=LOWEST)
    for tile in tl.range(first_tile, full, num_stages=STAGES):
        factor = tl.exp2(following - peak).to(dtype)
        # A tile ahead, since this load waits for nothing else.
        ahead = tl.minimum((tile + 1) // (PIECE // TILE), last - 1)
        following = tl.load(at_stats + ahead * (3 * SLOTS), mask=heads_ok, other=LOWEST)
        tile_start = tl.cast(tile * TILE, tl.int64) * latents_t
        weight = tl.load(at_weights + tile * TILE, mask=heads_ok[:, None], other=0.0)
        summed = _weighed(
            summed, weight, factor, first_source + tile_start + within, first_plane + tile_start + within, everything,
            column, rank, BITS, BLOCK_RANK, ASSEMBLY, dtype,
        )  # fmt: skip
    if full < last_tile:
        factor = tl.exp2(following - peak).to(dtype)
        tile_start = tl.cast(full * TILE, tl.int64) * latents_t
        weight = tl.load(at_weights + full * TILE, mask=heads_ok[:, None], other=0.0)
        ok = (full * TILE + inside < length)[:, None]
        summed = _weighed(
            summed, weight, factor, first_source + tile_start + within, first_plane + tile_start + within, ok,
            column, rank, BITS, BLOCK_RANK, ASSEMBLY, dtype,
        )  # fmt: skip
    at = (first_part + part) * rows_heads + row * HEADS + head
    tl.store(totals + at, total, mask=heads_ok)
    tl.store(range_peaks + at, peak, mask=heads_ok)
    out = sums + at[:, None].to(tl.int64) * RANK_STRIDE
    latent = tl.arange(0, BLOCK_RANK)
    if BITS < 16:
        half: tl.constexpr = BLOCK_RANK // 2
        latent = first_of_pair(BLOCK_RANK, BITS, latent % half) + latent // half * half_word(BITS)
        summed -= shifts[:, None]
    latent += column
    tl.store(out + latent[None, :], summed, mask=heads_ok[:, None] & (latent < rank)[None, :])


@triton.jit(do_not_specialize=["parts", "rows_heads"])
def combine_kernel(
    sums, totals, range_peaks, up, bias, output, rank_of, offset_of, parts, rows_heads, up_stride,
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
        peak = tl.maximum(peak, tl.max(tl.load(range_peaks + at, mask=begin + part < parts, other=LOWEST), 0))
    weight = tl.zeros((BLOCK_PARTS,), tl.float32)
    for begin in range(0, parts, BLOCK_PARTS):
        at = (begin + part) * rows_heads + row_head
        ok = begin + part < parts
        share = tl.exp2(tl.load(range_peaks + at, mask=ok, other=LOWEST) - peak)
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
            share = tl.exp2(tl.load(range_peaks + at, mask=part_ok, other=LOWEST) - peak)
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
