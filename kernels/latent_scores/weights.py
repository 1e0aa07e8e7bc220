"""Triton kernels that prepare a step: tables of turns, where blocks start, and the matrices of their slow pairs."""

import triton
import triton.language as tl

from palu.kernels.latent_scores.tiles import CHUNK_PAIRS, GAPS, HIDDEN, exact_stretch, turn, visible_tokens

# Blocks that are looked at together for gaps.
CHECKED: tl.constexpr = tl.constexpr(32)


@triton.jit(do_not_specialize=["length", "positions_b"])
def table_kernel(
    positions, frequencies, table, length, positions_b, positions_t,
    PAIRS: tl.constexpr, STORED: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """cos and sin of PAIRS pairs of TOKENS tokens: pairs 0, LANES, 2 LANES, .. first.

    Of LANES, cosines of two of them come before both sines. table: [rows, length, STORED, 2]; COLUMNS: STORED padded to
    a power of two.
    """
    token, row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    ok = token < length
    column = tl.arange(0, COLUMNS)
    each: tl.constexpr = COLUMNS // LANES
    pair = column % each * LANES + column // each
    position = tl.load(positions + row * positions_b + token * positions_t, mask=ok, other=0).to(tl.float32)
    frequency = tl.load(frequencies + pair, mask=pair < PAIRS, other=0.0)
    cosine, sine = turn(position[:, None] * frequency[None, :])
    there = (pair < PAIRS)[None, :]
    both = tl.join(tl.where(there, cosine, 0.0), tl.where(there, sine, 0.0)).to(DTYPE)
    if LANES > 1:
        both = tl.permute(tl.reshape(both, (TOKENS, COLUMNS // 2, 2, 2)), (0, 1, 3, 2))
    place = tl.arange(0, 2 * COLUMNS)[None, :]
    at = table + (row.to(tl.int64) * length + token)[:, None] * (2 * STORED) + place
    tl.store(at, tl.reshape(both, (TOKENS, 2 * COLUMNS)), mask=ok[:, None] & (place < 2 * STORED))


@triton.jit(do_not_specialize=["length", "blocks", "positions_b", "mask_b"])
def turn_kernel(
    positions, frequencies, cos_basis, sin_basis, mask, starts, turns,
    length, blocks, positions_b, positions_t, mask_b, mask_t,
    PAIRS: tl.constexpr, ROWS_PER_POSITIONS: tl.constexpr, FAST: tl.constexpr, SLOW: tl.constexpr,
    COLUMNS: tl.constexpr, SPAN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Where a block of SPAN tokens starts, and what turns the slow pairs' basis to there.

    starts: int32 [rows, blocks], the position of the block's token 0, or HIDDEN, or GAPS.
    turns: [rows, blocks, COLUMNS, 2, SLOW], the shares of a and of b.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    token = block * SPAN + tl.arange(0, SPAN)
    ok = token < length
    seen, _ = visible_tokens(mask, row * mask_b, token, mask_t, ok, MASK)
    at = positions + row // ROWS_PER_POSITIONS * positions_b + token * positions_t
    lead = tl.load(at, mask=ok, other=0).to(tl.int32) - tl.arange(0, SPAN)
    lowest, highest = tl.min(tl.where(seen, lead, GAPS), 0), tl.max(tl.where(seen, lead, HIDDEN), 0)
    start = tl.where(lowest == highest, lowest, GAPS)
    start = tl.where(highest == HIDDEN, HIDDEN, start)
    tl.store(starts + row * blocks + block, start)
    pair = FAST + tl.arange(0, SLOW)
    slow_ok = pair < PAIRS
    start = tl.where((start == HIDDEN) | (start == GAPS), 0, start).to(tl.float32)
    c, s = turn(start * tl.load(frequencies + pair, mask=slow_ok, other=0.0))
    at_basis = tl.arange(0, COLUMNS)[:, None] * PAIRS + pair[None, :]
    basis_c = tl.load(cos_basis + at_basis, mask=slow_ok[None, :], other=0.0)
    basis_s = tl.load(sin_basis + at_basis, mask=slow_ok[None, :], other=0.0)
    out = turns + (row * blocks + block).to(tl.int64) * (COLUMNS * 2 * SLOW)
    out += tl.arange(0, COLUMNS)[:, None] * (2 * SLOW) + tl.arange(0, SLOW)[None, :]
    tl.store(out, (c[None, :] * basis_c - s[None, :] * basis_s).to(turns.dtype.element_ty))
    tl.store(out + SLOW, (s[None, :] * basis_c + c[None, :] * basis_s).to(turns.dtype.element_ty))


@triton.jit
def _fold(
    query, up, up_stride, bias, first_pair, pairs, scaling, member, kv_head, offset, latent, rank,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """`a` and `b` of a head's pairs, float32 [PAIRS, latents], and what a bias adds to them, [PAIRS].

    query: the head's. Pairs beyond the last one and latents beyond the rank are zero.
    """
    pair = first_pair + tl.arange(0, PAIRS)
    pair_ok = pair < pairs
    q_first = tl.load(query + pair, mask=pair_ok, other=0.0).to(tl.float32) * scaling
    q_second = tl.load(query + pair + HEAD_DIM // 2, mask=pair_ok, other=0.0).to(tl.float32) * scaling
    ok = pair_ok[:, None] & (latent < rank)[None, :]
    source = up + ((member * HEAD_DIM + pair) * up_stride)[:, None] + offset + latent[None, :]
    first = tl.load(source, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source + HEAD_DIM // 2 * up_stride, mask=ok, other=0.0).to(tl.float32)
    a = q_first[:, None] * first + q_second[:, None] * second
    b = q_second[:, None] * first - q_first[:, None] * second
    bias_a, bias_b = q_first, q_second
    if HAS_BIAS:
        at_bias = bias + kv_head * HEAD_DIM + pair
        bias_first = tl.load(at_bias, mask=pair_ok, other=0.0).to(tl.float32)
        bias_second = tl.load(at_bias + HEAD_DIM // 2, mask=pair_ok, other=0.0).to(tl.float32)
        bias_a = q_first * bias_first + q_second * bias_second
        bias_b = q_second * bias_first - q_first * bias_second
    return a, b, bias_a, bias_b


@triton.jit(do_not_specialize=["length", "blocks", "rows_per_turn", "tiles", "scales_b", "positions_b", "mask_b"])
def weight_kernel(
    query, latents, scales, up, bias, positions, frequencies, mask, starts, turns, slow_weights, slow_biases,
    fast_weights, fast_biases, scores, rank_of, offset_of, byte_of, plane_of,
    length, blocks, latents_b, latents_t, scales_b, scales_t, up_stride, positions_b,
    positions_t, mask_b, mask_t, turns_b, rows_per_turn, tiles, stored, stored_from, scaling,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr, FAST: tl.constexpr, SLOW: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, QUERY_ROWS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
    MASK: tl.constexpr, HAS_BIAS: tl.constexpr, ASSEMBLY: tl.constexpr, DIVISOR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The slow pairs' matrices of tiles * ROWS / COLUMNS blocks for one query head: turns [a; b].

    The first program of a head with a kv head of its own also stores the fast pairs' a and b. The heads of a block of
    heads share the blocks with gaps, whose scores are computed here, exactly.

    slow_weights: [rows, blocks, head blocks, KV * QUERY_SLOTS * COLUMNS, RANK]; fast_weights: [rows, head blocks,
    2 * FAST // CHUNK, KV, CHUNK, RANK], a and b of a pair side by side.
    """
    chunk, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = head // QUERIES
    group, member = kv_head // HEADS_PER_GROUP, kv_head % HEADS_PER_GROUP
    head_blocks: tl.constexpr = (HEADS_PER_GROUP + KV - 1) // KV
    head_block = group * head_blocks + member // KV
    all_blocks: tl.constexpr = head_blocks * (KV_HEADS // HEADS_PER_GROUP)
    place = member % KV * QUERY_SLOTS + head % QUERIES
    # Saying of what ranks are multiples lets loads be wide.
    rank = tl.multiple_of(tl.load(rank_of + group), DIVISOR)
    offset = tl.multiple_of(tl.load(offset_of + group), DIVISOR)
    if BITS < 16:
        # The factor is in the order of the codes, every group as wide as the others.
        rank, offset = RANK, group * RANK
    out_head = row * all_blocks + head_block
    slow = tl.arange(0, SLOW)
    at_query = query + (row * HEADS + head) * HEAD_DIM
    WIDE: tl.constexpr = KV * QUERY_SLOTS * COLUMNS
    PART: tl.constexpr = 128 if RANK > 128 else RANK
    for part in tl.range(0, RANK, PART, num_stages=1):
        latent = part + tl.arange(0, PART)
        if QUERIES == 1 and chunk == 0:
            for first_pair in tl.static_range(0, FAST, CHUNK_PAIRS):
                fast_a, fast_b, fast_bias_a, fast_bias_b = _fold(
                    at_query, up, up_stride, bias, first_pair, FAST, scaling, member, kv_head, offset, latent, rank,
                    HEAD_DIM, CHUNK_PAIRS, HAS_BIAS,
                )  # fmt: skip
                column = 2 * (first_pair + tl.arange(0, CHUNK_PAIRS))
                at = out_head * (KV * 2 * FAST) + (column // CHUNK * KV + place) * CHUNK + column % CHUNK
                at_fast = fast_weights + at[:, None] * RANK + latent[None, :]
                there = column < 2 * FAST
                tl.store(at_fast, fast_a.to(DTYPE), mask=there[:, None])
                tl.store(at_fast + RANK, fast_b.to(DTYPE), mask=there[:, None])
                if HAS_BIAS and part == 0:
                    tl.store(fast_biases + at, fast_bias_a, mask=there)
                    tl.store(fast_biases + at + 1, fast_bias_b, mask=there)
        a, b, bias_a, bias_b = _fold(
            at_query, up, up_stride, bias, FAST, HEAD_DIM // 2, scaling, member, kv_head, offset, latent, rank,
            HEAD_DIM, SLOW, HAS_BIAS,
        )  # fmt: skip
        a, b = a.to(DTYPE), b.to(DTYPE)
        for tile in tl.range(0, tiles, num_stages=3):
            index = (chunk * tiles + tile) * ROWS + tl.arange(0, ROWS)
            block = index // COLUMNS
            row_ok = block < blocks
            at_turn = turns + row // rows_per_turn * turns_b + index[:, None] * (2 * SLOW) + slow[None, :]
            w = tl.dot(tl.load(at_turn, mask=row_ok[:, None], other=0.0), a, input_precision="ieee")
            w = tl.dot(tl.load(at_turn + SLOW, mask=row_ok[:, None], other=0.0), b, w, input_precision="ieee")
            out = ((row * blocks + block).to(tl.int64) * all_blocks + head_block) * WIDE
            out += place * COLUMNS + index % COLUMNS
            tl.store(slow_weights + out[:, None] * RANK + latent[None, :], w.to(DTYPE), mask=row_ok[:, None])
            if HAS_BIAS and part == 0:
                along_a = tl.load(at_turn, mask=row_ok[:, None], other=0.0).to(tl.float32)
                along_b = tl.load(at_turn + SLOW, mask=row_ok[:, None], other=0.0).to(tl.float32)
                added = tl.sum(along_a * bias_a[None, :] + along_b * bias_b[None, :], 1)
                tl.store(slow_biases + out, added, mask=row_ok)
    sharers = tl.minimum(HEADS_PER_GROUP - member // KV * KV, KV) * QUERIES
    together = tiles * ROWS // COLUMNS
    at_starts = starts + row // rows_per_turn * blocks
    last = tl.minimum(blocks, (chunk + 1) * together)
    for first in tl.range(chunk * together, last, CHECKED, num_stages=1):
        several = first + tl.arange(0, CHECKED)
        highest = tl.max(tl.load(at_starts + several, mask=several < last, other=HIDDEN), 0)
        if highest == GAPS:
            to = tl.minimum(last, first + CHECKED)
            for block in tl.range(first + member % KV * QUERIES + head % QUERIES, to, sharers, num_stages=1):
                if tl.load(at_starts + block) == GAPS:
                    exact_stretch(
                        query, latents, scales, up, bias, up, positions, frequencies, mask, scores, rank_of, offset_of,
                        byte_of, plane_of, row, head_block, block * SPAN, tl.minimum(length, (block + 1) * SPAN),
                        length, latents_b, latents_t, scales_b, scales_t, up_stride, positions_b, positions_t, 0,
                        mask_b, mask_t, stored, stored_from, 0.0, scaling, HEAD_DIM, HEADS, KV_HEADS, HEADS_PER_GROUP,
                        KV, QUERIES, QUERY_SLOTS, SLOTS, QUERY_ROWS, TILE, RANK, BITS, ASYMMETRIC, MASK, HAS_BIAS,
                        False, DTYPE, ASSEMBLY, DIVISOR,
                    )  # fmt: skip
