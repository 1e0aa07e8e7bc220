"""Triton kernels of the scores of rotated queries against key latents.

With q already rotated at its own position, the rotary embedding of a rebuilt key `B x` at position t turns each pair of
dimensions (i, i + D/2) by the angle `t w_i`, so that

    q . RoPE_t(B x) = sum_i cos(t w_i) (a_i . x) + sin(t w_i) (b_i . x),
    a_i = q_i B_i + q_{i+D/2} B_{i+D/2},   b_i = q_{i+D/2} B_i - q_i B_{i+D/2}.

The FAST pairs, of highest frequencies, are rebuilt and rotated as they are. Over a block of positions t0 + s the others
turn so slowly that `[cos(s w_i), sin(s w_i)] ~ P Q` with few columns: `block_kernel` folds Q, t0, q and B into one
matrix per block and head, and the scores need only COLUMNS products per token instead of two per pair. Blocks whose
positions have gaps, and models that normalise keys, rebuild all pairs.
"""

import triton
import triton.language as tl

from palu.kernels.codes import load_latents
from palu.kernels.latent_scores.tiles import (
    CHUNK_PAIRS,
    GAPS,
    HIDDEN,
    exact_stretch,
    key_factor,
    less_zero_points,
    load_scales,
    make_weights,
    query_factor,
    rotated_scores,
    slots_used,
    store_scores,
    visible_tokens,
)


@triton.jit
def _slow_product(
    x, weights, at_weights, source, plane, ok, shift, rank, column_ok,
    WIDE: tl.constexpr, RANK: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, ASSEMBLY: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Products of latents wider than 128 with a block's matrix, [tokens, WIDE]."""
    product = tl.zeros((x.shape[0], WIDE), tl.float32)
    for part in tl.range(0, RANK, 128, num_stages=1):
        more = load_latents(source, plane, ok, part, rank, dtype, BITS, 128, ASSEMBLY)
        at = weights + (at_weights + tl.arange(0, WIDE)[None, :]) * RANK + part + tl.arange(0, 128)[:, None]
        product = tl.dot(
            less_zero_points(more, shift, ASYMMETRIC), tl.load(at, mask=column_ok[None, :], other=0.0), product,
            input_precision="ieee",
        )  # fmt: skip
    return product


@triton.jit
def _fast_product(
    x, up, up_stride, offset, first_kv, kv_left, chunk, half, source, plane, ok, shift, rank, factor_rank,
    HEAD_DIM: tl.constexpr, KV: tl.constexpr, RANK: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
    ASSEMBLY: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """One half of a chunk of rebuilt pairs from latents wider than 128, [tokens, KV * CHUNK_PAIRS]."""
    product = tl.zeros((x.shape[0], KV * CHUNK_PAIRS), tl.float32)
    for part in tl.range(0, RANK, 128, num_stages=1):
        more = load_latents(source, plane, ok, part, rank, dtype, BITS, 128, ASSEMBLY)
        factor = key_factor(
            up, up_stride, offset, factor_rank, first_kv, kv_left, chunk, half, part, HEAD_DIM, KV, 128, 1
        )
        product = tl.dot(less_zero_points(more, shift, ASYMMETRIC), factor.to(dtype), product, input_precision="ieee")
    return product


@triton.jit
def _interpolated_tile(
    factors, q_first, q_second, slow, gather, slow_biases, column_ok, scale, shift, up, bias, cos, sin, basis, weights,
    at_weights, source, plane, at_table, along, token, ok, up_stride, offset, rank, factor_rank,
    first_kv, kv_left, first_bias,
    HEAD_DIM: tl.constexpr, KV: tl.constexpr, QUERY_SLOTS: tl.constexpr, FAST: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, ASSEMBLY: tl.constexpr, HAS_BIAS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of a block without gaps, [tokens, SLOTS]."""
    TILE: tl.constexpr = token.shape[0]
    WIDE: tl.constexpr = KV * QUERY_SLOTS * COLUMNS
    KEPT: tl.constexpr = RANK <= 128
    PART: tl.constexpr = 128 if RANK > 128 else RANK
    x = load_latents(source, plane, ok[:, None], 0, rank, dtype, BITS, PART, ASSEMBLY)
    x = less_zero_points(x, shift, ASYMMETRIC)
    if KEPT:
        product = tl.dot(x, slow[0], input_precision="ieee")
    else:
        product = _slow_product(
            x, weights, at_weights, source, plane, ok[:, None], shift, rank, column_ok, WIDE, RANK, BITS, ASYMMETRIC,
            ASSEMBLY, dtype,
        )  # fmt: skip
    share = tl.load(basis + along[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]).to(tl.float32)
    # Scales meet the small tables, or the products where a bias has to be added to them.
    if (BITS < 16) and not HAS_BIAS:
        share *= scale[:, None]
    if HAS_BIAS:
        product = product * scale[:, None] + slow_biases[None, :] if BITS < 16 else product + slow_biases[None, :]
    product = tl.reshape(product, (TILE, KV * QUERY_SLOTS, COLUMNS)) * share[:, None, :]
    score = tl.dot(tl.reshape(product, (TILE, WIDE)).to(dtype), gather, input_precision="ieee")
    for chunk in tl.static_range(FAST // CHUNK_PAIRS):
        if KEPT and BITS == 16:
            # One product of both halves: twice as wide, half the instructions.
            both = tl.reshape(tl.dot(x, factors[chunk], input_precision="ieee"), (TILE, 2, KV * CHUNK_PAIRS))
            first, second = tl.split(tl.permute(both, (0, 2, 1)))
        elif KEPT:
            # Codes stay in registers, in a layout that depends on the width: that of the slow pairs' product.
            first = tl.dot(x, factors[2 * chunk], input_precision="ieee")
            second = tl.dot(x, factors[2 * chunk + 1], input_precision="ieee")
        else:
            first = _fast_product(
                x, up, up_stride, offset, first_kv, kv_left, chunk, 0, source, plane, ok[:, None], shift, rank,
                factor_rank, HEAD_DIM, KV, RANK, BITS, ASYMMETRIC, ASSEMBLY, dtype,
            )  # fmt: skip
            second = _fast_product(
                x, up, up_stride, offset, first_kv, kv_left, chunk, 1, source, plane, ok[:, None], shift, rank,
                factor_rank, HEAD_DIM, KV, RANK, BITS, ASYMMETRIC, ASSEMBLY, dtype,
            )  # fmt: skip
        at_chunk = at_table + tl.arange(0, CHUNK_PAIRS)[None, :] + chunk * CHUNK_PAIRS
        c = tl.load(cos + at_chunk, mask=ok[:, None], other=0.0).to(tl.float32)
        s = tl.load(sin + at_chunk, mask=ok[:, None], other=0.0).to(tl.float32)
        if (BITS < 16) and not HAS_BIAS:
            c, s = c * scale[:, None], s * scale[:, None]
        if HAS_BIAS:
            column = tl.arange(0, KV * CHUNK_PAIRS)
            kv = column // CHUNK_PAIRS
            at_bias = bias + first_bias + kv * HEAD_DIM + column % CHUNK_PAIRS + chunk * CHUNK_PAIRS
            bias_first = tl.load(at_bias, mask=kv < kv_left, other=0.0).to(tl.float32)[None, :]
            bias_second = tl.load(at_bias + HEAD_DIM // 2, mask=kv < kv_left, other=0.0).to(tl.float32)[None, :]
            if BITS < 16:
                first, second = first * scale[:, None], second * scale[:, None]
            first, second = first + bias_first, second + bias_second
        score = rotated_scores(score, first, second, c, s, q_first[chunk], q_second[chunk], dtype, KV)
    return score


# Numbers that grow with the cache: specialising on them would compile again and again while decoding.
@triton.jit(
    do_not_specialize=[
        "length", "blocks", "block_step", "all_pieces", "first_piece", "rows_per_start", "scales_b", "positions_b",
        "mask_b", "value_scales_b",
    ]
)  # fmt: skip
def scores_kernel(
    query, latents, scales, up, bias, norm, cos, sin, positions, frequencies, basis, mask,
    starts, weights, weight_biases, value_scales, scores, output, stats, rank_of, offset_of, byte_of, plane_of,
    block_step, length, blocks,
    latents_b, latents_t, scales_b, scales_t, up_stride, table_b, table_t, positions_b, positions_t, mask_b, mask_t,
    value_scales_b, value_scales_t, rows_per_start, stored, stored_from, all_pieces, first_piece, norm_epsilon, scaling,
    MODE: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr, KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr,
    SLOTS: tl.constexpr, QUERY_ROWS: tl.constexpr, FAST: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr, QUERY_STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr, MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    VALUE_GROUP: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_ASYMMETRIC: tl.constexpr, RAW: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, DIVISOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of KV kv heads' queries for every block_step-th piece of the tokens.

    A piece is PIECE = SPAN // PIECES tokens of one block. scores: base-2 logarithms of weights (`scaling` carries
    log2(e)), float32 [rows, head blocks, SLOTS, stored]. Unless RAW, output: softmax weights relative to
    the largest of each piece, and stats [rows, head blocks, pieces, 3, SLOTS]: that, their sum, and their sum with
    the values' zero points. MODE: "interpolated", "exact" (all pairs rebuilt), or "absorbed" (no rotation, the query
    already multiplied with the up factor: [rows, HEADS, QUERY_STRIDE]).
    """
    first_block, head_block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = DTYPE
    head_blocks: tl.constexpr = (HEADS_PER_GROUP + KV - 1) // KV
    all_blocks: tl.constexpr = head_blocks * (KV_HEADS // HEADS_PER_GROUP)
    group, first_kv = head_block // head_blocks, head_block % head_blocks * KV
    kv_left = HEADS_PER_GROUP - first_kv
    first_head = (group * HEADS_PER_GROUP + first_kv) * QUERIES
    heads_left = kv_left * QUERIES
    first_bias = (group * HEADS_PER_GROUP + first_kv) * HEAD_DIM
    # Saying of what ranks are multiples lets loads be wide.
    rank = tl.multiple_of(tl.load(rank_of + group), DIVISOR)
    offset = tl.multiple_of(tl.load(offset_of + group), DIVISOR)
    byte = tl.multiple_of(tl.load(byte_of + group), DIVISOR * BITS // 8 if BITS < 16 else DIVISOR)
    factor_rank = rank
    if BITS < 16:
        # The factor is in the order of the codes, every group as wide as the others.
        factor_rank, offset = RANK, group * RANK
    at_row = row // QUERY_ROWS
    if ASYMMETRIC:
        # Scales and zero points lie side by side, so rows of them start at whole words.
        scales_b = tl.multiple_of(scales_b, 2)
    first_source = latents + at_row.to(tl.int64) * latents_b + byte
    first_plane = latents + at_row.to(tl.int64) * latents_b + tl.load(plane_of + group)
    slot = tl.arange(0, SLOTS)
    slot_head = slot // QUERY_SLOTS * QUERIES + slot % QUERY_SLOTS
    slot_ok = slots_used(slot, QUERY_SLOTS, QUERIES, heads_left)
    used = tl.arange(0, KV * QUERY_SLOTS)
    used_head = first_head + used // QUERY_SLOTS * QUERIES + used % QUERY_SLOTS
    value_group = tl.where(slots_used(used, QUERY_SLOTS, QUERIES, heads_left), used_head // VALUE_GROUP, 0)
    out = (row * all_blocks + head_block).to(tl.int64)
    PART: tl.constexpr = 128 if RANK > 128 else RANK
    KEPT: tl.constexpr = RANK <= 128
    WIDE: tl.constexpr = KV * QUERY_SLOTS * COLUMNS

    factors, q_first, q_second, gather = (), (), (), ()
    if MODE == "interpolated":
        for chunk in tl.static_range(FAST // CHUNK_PAIRS):
            first, second = query_factor(
                query + row * HEADS * HEAD_DIM,
                scaling,
                first_head,
                heads_left,
                chunk,
                HEAD_DIM,
                KV,
                QUERIES,
                QUERY_SLOTS,
                SLOTS,
            )
            q_first, q_second = q_first + (first.to(dtype),), q_second + (second.to(dtype),)
            if KEPT and BITS == 16:
                factor = key_factor(
                    up, up_stride, offset, factor_rank, first_kv, kv_left, chunk, 0, 0, HEAD_DIM, KV, PART, 2
                )
                factors = factors + (factor.to(dtype),)
            elif KEPT:
                for half in tl.static_range(2):
                    factor = key_factor(
                        up, up_stride, offset, factor_rank, first_kv, kv_left, chunk, half, 0, HEAD_DIM, KV, PART, 1
                    )
                    factors = factors + (factor.to(dtype),)
        gather = gather + (((tl.arange(0, WIDE) // COLUMNS)[:, None] == slot[None, :]).to(dtype),)
    if MODE == "absorbed":
        at_query = query + ((row * HEADS + first_head + slot_head) * QUERY_STRIDE)[None, :]
        for part in tl.static_range(0, RANK, PART):
            latent = part + tl.arange(0, PART)
            both_ok = (latent < factor_rank)[:, None] & slot_ok[None, :]
            factor = tl.load(at_query + latent[:, None], mask=both_ok, other=0.0).to(tl.float32) * scaling
            factors = factors + (factor.to(dtype),)

    for piece in tl.range(first_block, tl.cdiv(length, PIECE), block_step, num_stages=1):
        block = piece // PIECES
        last = tl.minimum(PIECE // TILE, tl.cdiv(length - piece * PIECE, TILE))
        start = 0
        if MODE == "interpolated":
            start = tl.load(starts + row // rows_per_start * blocks + block)
        if MODE == "exact":
            exact_stretch(
                query, latents, scales, up, bias, norm, positions, frequencies, mask, scores, rank_of, offset_of,
                byte_of, plane_of, row, head_block, piece * PIECE, piece * PIECE + last * TILE, length, latents_b,
                latents_t, scales_b, scales_t, up_stride, positions_b, positions_t, mask_b, mask_t, stored, stored_from,
                norm_epsilon, scaling, HEAD_DIM, HEADS, KV_HEADS, HEADS_PER_GROUP, KV, QUERIES, QUERY_SLOTS, SLOTS,
                QUERY_ROWS, TILE, RANK, BITS, ASYMMETRIC, MASK, HAS_BIAS, HAS_NORM, DTYPE, ASSEMBLY, DIVISOR,
            )  # fmt: skip
        elif start == HIDDEN:
            token = piece * PIECE + tl.arange(0, PIECE)
            at = (out * SLOTS + slot[:, None]) * stored + stored_from + token[None, :]
            hidden = tl.zeros((SLOTS, PIECE), tl.float32) - float("inf")
            tl.store(scores + at, hidden, mask=slot_ok[:, None] & (token < piece * PIECE + last * TILE)[None, :])
        # `weight_kernel` has the scores of blocks with gaps.
        elif start != GAPS:
            slow, slow_biases, column_ok = (), tl.zeros((WIDE,), tl.float32), tl.arange(0, WIDE) >= 0
            at_weights = ((row * blocks + block).to(tl.int64) * all_blocks + head_block) * WIDE
            if MODE == "interpolated":
                column = tl.arange(0, WIDE)
                column_ok = slots_used(column // COLUMNS, QUERY_SLOTS, QUERIES, heads_left)
                if KEPT:
                    at_slow = weights + (at_weights + column[None, :]) * RANK + tl.arange(0, RANK)[:, None]
                    slow = slow + (tl.load(at_slow, mask=column_ok[None, :], other=0.0),)
                if HAS_BIAS:
                    slow_biases = tl.load(weight_biases + at_weights + column, mask=column_ok, other=0.0)
            inside = tl.arange(0, TILE)
            for tile in tl.range(0, last, num_stages=STAGES):
                # From the tile on in 32 bits, so that addresses stay cheap.
                tile_start = piece * PIECE + tile * TILE
                token = tile_start + inside
                ok = token < length
                tile_source = first_source + tl.cast(tile_start, tl.int64) * latents_t
                tile_plane = first_plane + tl.cast(tile_start, tl.int64) * latents_t
                source, plane = tile_source + (inside * latents_t)[:, None], tile_plane + (inside * latents_t)[:, None]
                scale, shift = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
                if BITS < 16:
                    at_scale = at_row * scales_b + token * scales_t + group * (2 if ASYMMETRIC else 1)
                    scale, shift = load_scales(scales, at_scale, ok, BITS, ASYMMETRIC)
                if MODE == "absorbed":
                    score = tl.zeros((TILE, SLOTS), tl.float32)
                    for part in tl.static_range(0, RANK, PART):
                        x = load_latents(source, plane, ok[:, None], part, rank, dtype, BITS, PART, ASSEMBLY)
                        x = less_zero_points(x, shift, ASYMMETRIC)
                        score = tl.dot(x, factors[part // PART], score, input_precision="ieee")
                    if BITS < 16:
                        score *= scale[:, None]
                else:
                    at_table = at_row * table_b + token[:, None] * table_t
                    along = piece % PIECES * PIECE + tile * TILE + inside
                    score = _interpolated_tile(
                        factors, q_first, q_second, slow, gather[0], slow_biases, column_ok, scale, shift, up, bias,
                        cos,
                        sin,
                        basis, weights, at_weights, source, plane, at_table, along, token, ok, up_stride,
                        offset, rank, factor_rank, first_kv, kv_left, first_bias, HEAD_DIM, KV, QUERY_SLOTS, FAST,
                        COLUMNS, RANK,
                        BITS, ASYMMETRIC, ASSEMBLY, HAS_BIAS, dtype,
                    )  # fmt: skip
                seen, added = visible_tokens(mask, row * mask_b, token, mask_t, ok, MASK)
                store_scores(
                    score, added, seen, token + stored_from, scores, out, stored, slot_ok, SLOTS, MASK,
                )  # fmt: skip
        if not RAW:
            # The piece's scores have been written by other threads of this program.
            tl.debug_barrier()
            make_weights(
                scores, output, stats, value_scales, at_row * value_scales_b, value_scales_t, value_group,
                out, piece * PIECE, tl.minimum(piece * PIECE + last * TILE, length), stored, stored_from,
                first_piece + piece, all_pieces,
                SLOTS, KV * QUERY_SLOTS, PIECE, VALUE_BITS, VALUE_ASYMMETRIC,
            )  # fmt: skip
