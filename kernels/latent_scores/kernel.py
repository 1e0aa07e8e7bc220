"""Triton kernel of the scores of rotated queries against key latents.

With q already rotated at its own position, the rotary embedding of a rebuilt key `B x` at position t turns each pair of
dimensions (i, i + D/2) by the angle `t w_i`, so that

    q . RoPE_t(B x) = sum_i cos(t w_i) (a_i . x) + sin(t w_i) (b_i . x),
    a_i = q_i B_i + q_{i+D/2} B_{i+D/2},   b_i = q_{i+D/2} B_i - q_i B_{i+D/2}.

Over a block of positions t0 + s all but the FAST pairs, of highest frequencies, turn so slowly that
`[cos(s w_i), sin(s w_i)] ~ P Q` with few columns: `weight_kernel` folds Q, t0, q and B into one matrix per block and
head, and the scores need only COLUMNS products per token instead of two per pair. Fast pairs are folded with the query
alone where a kv head has one query ("folded"); several queries share the rebuilt and rotated pairs ("shared"). Blocks
whose positions have gaps, and models that normalise keys, rebuild all pairs ("exact"). Without a rotation the query is
multiplied with B beforehand ("absorbed").
"""

import triton
import triton.language as tl

from palu.kernels.latent_scores.interpolated import score_tile
from palu.kernels.latent_scores.tiles import GAPS, HIDDEN, exact_stretch, paired_query, paired_rows, slots_used


# Numbers that grow with the cache: specialising on them would compile again and again while decoding.
@triton.jit(
    do_not_specialize=["length", "blocks", "block_step", "rows_per_start", "scales_b", "positions_b", "mask_b"]
)  # fmt: skip
def scores_kernel(
    query, latents, scales, up, bias, norm, table, positions, frequencies, basis, mask,
    starts, slow_weights, slow_biases, fast_weights, fast_biases, scores, rank_of, offset_of, byte_of, plane_of,
    block_step, length, blocks,
    latents_b, latents_t, scales_b, scales_t, up_stride, table_b, table_t, positions_b, positions_t, positions_g,
    mask_b, mask_t, rows_per_start, stored, stored_from, norm_epsilon, scaling,
    MODE: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr, KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr,
    SLOTS: tl.constexpr, QUERY_ROWS: tl.constexpr, FAST: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    SPAN: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr,
    PART: tl.constexpr, KEPT: tl.constexpr, QUERY_STRIDE: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
    MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
    DIVISOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of KV kv heads' queries for every block_step-th piece of the tokens.

    A piece is PIECE tokens: several blocks of SPAN, or a part of one. scores: base-2 logarithms of weights (`scaling`
    carries log2(e)), float32 [rows, head blocks, SLOTS, stored]. query: [rows, HEADS, HEAD_DIM], absorbed [rows, HEADS,
    QUERY_STRIDE].
    """
    first_piece, head_block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
    out = (row * all_blocks + head_block).to(tl.int64)
    # Slots that a tile's scores have: products of several queries come padded to what the matrix units want.
    SCORED: tl.constexpr = KV if MODE == "folded" else SLOTS
    WIDE: tl.constexpr = KV * QUERY_SLOTS * COLUMNS
    slot = tl.arange(0, SCORED)
    slot_ok = slots_used(slot, QUERY_SLOTS, QUERIES, heads_left)
    latent = tl.arange(0, PART)

    factors, queries, gather = (), (), ()
    at_fast = fast_weights + (out * (KV * 2 * FAST) + tl.arange(0, KV * CHUNK)[None, :]) * RANK
    at_fast_biases = fast_biases + out * (KV * 2 * FAST)
    at_up = up + (first_kv * HEAD_DIM * up_stride + offset)
    if MODE == "folded":
        for chunk in tl.static_range(2 * FAST // CHUNK if KEPT else 0):
            for part in tl.static_range(0, RANK, PART):
                factors = factors + (tl.load(at_fast + chunk * KV * CHUNK * RANK + (part + latent)[:, None]),)
    if MODE == "shared":
        for chunk in tl.static_range(2 * FAST // CHUNK):
            first, second = paired_query(
                query + (row * HEADS + first_head) * HEAD_DIM, scaling, heads_left, chunk, HEAD_DIM, KV, QUERIES,
                QUERY_SLOTS, SLOTS, CHUNK // 2,
            )  # fmt: skip
            queries = queries + (first.to(dtype), second.to(dtype))
            at_rows = at_up + paired_rows(chunk, kv_left, HEAD_DIM, KV, CHUNK)[None, :] * up_stride
            for part in tl.static_range(0, RANK if KEPT else 0, PART):
                columns = part + latent[:, None]
                factors = factors + (tl.load(at_rows + columns, mask=columns < factor_rank, other=0.0).to(dtype),)
        gather = gather + (((tl.arange(0, WIDE) // COLUMNS)[:, None] == slot[None, :]).to(dtype),)
    if MODE == "absorbed":
        slot_head = slot // QUERY_SLOTS * QUERIES + slot % QUERY_SLOTS
        at_up = query + ((row * HEADS + first_head + slot_head) * QUERY_STRIDE)[None, :]
        for part in tl.static_range(0, RANK if KEPT else 0, PART):
            both_ok = (part + latent < factor_rank)[:, None] & slot_ok[None, :]
            factor = tl.load(at_up + (part + latent)[:, None], mask=both_ok, other=0.0).to(tl.float32) * scaling
            factors = factors + (factor.to(dtype),)

    at_starts = starts + row // rows_per_start * blocks
    slow_row = row.to(tl.int64) * blocks * all_blocks + head_block
    at_slow = slow_weights + (slow_row * WIDE + tl.arange(0, WIDE)[None, :]) * RANK
    BLOCKS: tl.constexpr = PIECE // SPAN if PIECE > SPAN else 1
    for piece in tl.range(first_piece, tl.cdiv(length, PIECE), block_step, num_stages=1):
        first_token = piece * PIECE
        here = tl.minimum(PIECE, length - first_token)
        last = tl.cdiv(here, TILE)
        highest = 0
        if (MODE == "folded") or MODE == "shared":
            block = first_token // SPAN + tl.arange(0, BLOCKS)
            highest = tl.max(tl.load(at_starts + block, mask=block < blocks, other=HIDDEN), 0)
        if MODE == "exact":
            exact_stretch(
                query, latents, scales, up, bias, norm, positions, frequencies, mask, scores, rank_of, offset_of,
                byte_of, plane_of, row, head_block, first_token, first_token + last * TILE, length, latents_b,
                latents_t, scales_b, scales_t, up_stride, positions_b, positions_t, positions_g, mask_b, mask_t, stored,
                stored_from, norm_epsilon, scaling, HEAD_DIM, HEADS, KV_HEADS, HEADS_PER_GROUP, KV, QUERIES,
                QUERY_SLOTS, SLOTS, QUERY_ROWS, TILE, RANK, BITS, ASYMMETRIC, MASK, HAS_BIAS, HAS_NORM, DTYPE,
                ASSEMBLY, DIVISOR,
            )  # fmt: skip
        elif highest == HIDDEN:
            token = first_token + tl.arange(0, PIECE)
            at = (out * SLOTS + slot[:, None]) * stored + stored_from + token[None, :]
            hidden = tl.zeros((SCORED, PIECE), tl.float32) - float("inf")
            tl.store(scores + at, hidden, mask=slot_ok[:, None] & (token < length)[None, :])
        else:
            unchecked = tl.where(highest == GAPS, 0, here // TILE)
            # Tiles in full and without gaps, then those that have to be looked at.
            for checked in tl.static_range(2):
                for tile in tl.range(
                    unchecked if checked else 0, last if checked else unchecked, num_stages=1 if checked else STAGES
                ):
                    score_tile(
                        first_token + tile * TILE, factors, queries, gather, at_fast, at_fast_biases, at_slow,
                        all_blocks, slow_biases + slow_row * WIDE, at_up, up_stride, bias + first_bias, table, basis,
                        at_starts, scales, mask, scores, first_source, first_plane, latents_t, at_row * scales_b + group
                        * (2 if ASYMMETRIC else 1), scales_t, at_row * table_b, table_t, row * mask_b, mask_t, length,
                        rank, factor_rank, kv_left, out, stored, stored_from, scaling, MODE, HEAD_DIM, HEADS_PER_GROUP,
                        KV, QUERIES, QUERY_SLOTS, SLOTS, SCORED, FAST, COLUMNS, CHUNK, SPAN, TILE, RANK, PART, KEPT,
                        BITS, ASYMMETRIC, MASK, HAS_BIAS, dtype, ASSEMBLY, checked == 1,
                    )  # fmt: skip
