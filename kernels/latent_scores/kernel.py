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

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1e30)
# What `block_kernel` says of a block besides the position before its first token.
HIDDEN: tl.constexpr = tl.constexpr(-(1 << 30))
GAPS: tl.constexpr = tl.constexpr(1 << 30)
# Masks that add less than this hide a token.
HIDING: tl.constexpr = tl.constexpr(-30000.0)
CHUNK_PAIRS: tl.constexpr = tl.constexpr(16)


@triton.jit
def _turn(angle):
    """cos and sin of float32 angles, to 1e-7: reduced to a quarter turn in three parts, then the Cephes polynomials."""
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - quarters * 1.5703125
    rest = rest - quarters * 4.837512969970703e-4
    rest = rest - quarters * 7.549789948768648e-8
    square = rest * rest
    sine = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * square + square * square * (
        4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    )
    quadrant = quarters.to(tl.int32)
    swapped = (quadrant & 1) != 0
    cos = tl.where(swapped, sine, cosine)
    sin = tl.where(swapped, cosine, sine)
    cos = tl.where(((quadrant + 1) & 2) != 0, -cos, cos)
    sin = tl.where((quadrant & 2) != 0, -sin, sin)
    return cos, sin


@triton.jit
def _visible(mask, row_mask, token, mask_t, ok, MASK: tl.constexpr):
    """Whether tokens may be attended to, and what is added to their scores (base-2 logarithm)."""
    seen, added = ok, tl.zeros(token.shape, tl.float32)
    if MASK == "bool":
        seen = ok & (tl.load(mask + row_mask + token * mask_t, mask=ok, other=0) != 0)
    elif MASK == "additive":
        added = tl.load(mask + row_mask + token * mask_t, mask=ok, other=0.0).to(tl.float32)
        seen = ok & (added > HIDING)
        added = tl.maximum(added, HIDING) * LOG2_E
    return seen, added


@triton.jit(do_not_specialize=["length", "blocks"])
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
    seen, _ = _visible(mask, row * mask_b, token, mask_t, ok, MASK)
    at = positions + row // ROWS_PER_POSITIONS * positions_b + token * positions_t
    lead = tl.load(at, mask=ok, other=0).to(tl.int32) - tl.arange(0, SPAN)
    lowest, highest = tl.min(tl.where(seen, lead, GAPS), 0), tl.max(tl.where(seen, lead, HIDDEN), 0)
    start = tl.where(lowest == highest, lowest, GAPS)
    start = tl.where(highest == HIDDEN, HIDDEN, start)
    tl.store(starts + row * blocks + block, start)
    pair = FAST + tl.arange(0, SLOW)
    slow_ok = pair < PAIRS
    start = tl.where((start == HIDDEN) | (start == GAPS), 0, start).to(tl.float32)
    c, s = _turn(start * tl.load(frequencies + pair, mask=slow_ok, other=0.0))
    at_basis = tl.arange(0, COLUMNS)[:, None] * PAIRS + pair[None, :]
    basis_c = tl.load(cos_basis + at_basis, mask=slow_ok[None, :], other=0.0)
    basis_s = tl.load(sin_basis + at_basis, mask=slow_ok[None, :], other=0.0)
    out = turns + (row * blocks + block).to(tl.int64) * (COLUMNS * 2 * SLOW)
    out += tl.arange(0, COLUMNS)[:, None] * (2 * SLOW) + tl.arange(0, SLOW)[None, :]
    tl.store(out, (c[None, :] * basis_c - s[None, :] * basis_s).to(turns.dtype.element_ty))
    tl.store(out + SLOW, (s[None, :] * basis_c + c[None, :] * basis_s).to(turns.dtype.element_ty))


@triton.jit
def _key_factor(
    up, up_stride, offset, rank, first_kv, kv_left, chunk, half, part,
    HEAD_DIM: tl.constexpr, KV: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Rows of the up factor that rebuild one half of CHUNK_PAIRS pairs of KV heads: [RANK, KV * CHUNK_PAIRS]."""
    column = tl.arange(0, KV * CHUNK_PAIRS)
    kv, pair = column // CHUNK_PAIRS, column % CHUNK_PAIRS
    dim = (first_kv + kv) * HEAD_DIM + half * (HEAD_DIM // 2) + pair + chunk * CHUNK_PAIRS
    latent = part + tl.arange(0, RANK)
    ok = (latent < rank)[:, None] & (kv < kv_left)[None, :]
    return tl.load(up + (dim * up_stride)[None, :] + offset + latent[:, None], mask=ok, other=0.0)


@triton.jit
def _query_factor(
    query, first_head, heads_left, chunk,
    HEAD_DIM: tl.constexpr, KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The queries' CHUNK_PAIRS pairs, a block per kv head on the diagonal: twice [KV * CHUNK_PAIRS, SLOTS]."""
    row, slot = tl.arange(0, KV * CHUNK_PAIRS), tl.arange(0, SLOTS)
    kv, wanted = slot // QUERY_SLOTS, slot % QUERY_SLOTS
    head = kv * QUERIES + wanted
    ok = (row // CHUNK_PAIRS)[:, None] == kv[None, :]
    ok = ok & ((wanted < QUERIES) & (head < heads_left))[None, :]
    at = query + ((first_head + head) * HEAD_DIM)[None, :] + (row % CHUNK_PAIRS + chunk * CHUNK_PAIRS)[:, None]
    return tl.load(at, mask=ok, other=0.0), tl.load(at + HEAD_DIM // 2, mask=ok, other=0.0)


@triton.jit
def _rotated_scores(
    score, first, second, cos, sin, q_first, q_second, dtype: tl.constexpr, KV: tl.constexpr,
):  # fmt: skip
    """Add the scores of both halves of CHUNK_PAIRS rebuilt pairs; cos and sin: float32 [tokens, CHUNK_PAIRS]."""
    tokens: tl.constexpr = first.shape[0]
    first = tl.reshape(first, (tokens, KV, CHUNK_PAIRS))
    second = tl.reshape(second, (tokens, KV, CHUNK_PAIRS))
    c, s = cos[:, None, :], sin[:, None, :]
    turned = tl.reshape(first * c - second * s, (tokens, KV * CHUNK_PAIRS)).to(dtype)
    score = tl.dot(turned, q_first, score, input_precision="ieee")
    turned = tl.reshape(second * c + first * s, (tokens, KV * CHUNK_PAIRS)).to(dtype)
    return tl.dot(turned, q_second, score, input_precision="ieee")


@triton.jit
def load_scales(scales, at, ok, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """Scales, and zero points less the middle code, float32 [tokens]; both lie side by side and are fetched at once.

    at: where the scales lie, in fp16 numbers. A block of pairs is large enough for the compiler to copy it
    asynchronously once, where it would load single numbers again for every layout they are used in.
    """
    if ASYMMETRIC:
        pair = tl.load(scales + at[:, None] + tl.arange(0, 2)[None, :], mask=ok[:, None], other=1.0).to(tl.float32)
        scale, zero = tl.split(pair)
        shift = zero - (1 << (BITS - 1))
    else:
        scale = tl.load(scales + at, mask=ok, other=1.0).to(tl.float32)
        shift = tl.zeros(at.shape, tl.float32)
    return scale, shift


@triton.jit
def _less(x, shift, ASYMMETRIC: tl.constexpr):
    """Codes less their zero points, so that only the scale is left to apply; as exact as latents in x's dtype."""
    return x - shift[:, None].to(x.dtype) if ASYMMETRIC else x


@triton.jit
def _store_scores(score, added, seen, token, scores, out, stored, slot_ok, SLOTS: tl.constexpr, MASK: tl.constexpr):
    """Base-2 logarithms of weights, hidden tokens' at minus infinity."""
    if MASK == "additive":
        score += added[:, None]
    score = tl.where(seen[:, None], score, float("-inf"))
    at = (out * SLOTS + tl.arange(0, SLOTS)[None, :]) * stored + token[:, None]
    tl.store(scores + at, score, mask=slot_ok[None, :])


@triton.jit
def _make_weights(
    scores, weights, stats, value_scales, at_value_scale, value_scale_t, value_group, out, first, limit,
    stored, stored_from, piece, pieces, SLOTS: tl.constexpr, USED: tl.constexpr, PIECE: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_ASYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Softmax weights of a piece relative to its largest, and what puts pieces together: peak, sum, sum of zero points.

    Weights meet packed values times their scales, which is why a scale's logarithm joins the score here.
    """
    slot, token = tl.arange(0, USED)[:, None], first + tl.arange(0, PIECE)[None, :]
    at = (out * SLOTS + slot) * stored + stored_from + token
    score = tl.load(scores + at, mask=token < limit, other=float("-inf"))
    scaled = score
    seen = score > float("-inf")
    if VALUE_BITS < 16:
        at_value = at_value_scale + token * value_scale_t + value_group[:, None] * (2 if VALUE_ASYMMETRIC else 1)
        value_scale = tl.load(value_scales + at_value, mask=seen, other=1.0).to(tl.float32)
        scaled = score + tl.log2(value_scale)
    peak = tl.maximum(tl.max(scaled, 1), LOWEST)
    weight = tl.exp2(scaled - peak[:, None])
    rounded = weight.to(weights.dtype.element_ty)
    tl.store(weights + at, rounded)
    total = tl.sum(weight if VALUE_BITS == 16 else tl.exp2(score - peak[:, None]), 1)
    at_stats = stats + ((out * pieces + piece) * 3) * SLOTS + tl.arange(0, USED)
    tl.store(at_stats, peak)
    tl.store(at_stats + SLOTS, total)
    if VALUE_ASYMMETRIC:
        shift = tl.load(value_scales + at_value + 1, mask=seen, other=0.0).to(tl.float32) - (1 << (VALUE_BITS - 1))
        tl.store(at_stats + 2 * SLOTS, tl.sum(rounded.to(tl.float32) * shift, 1))


@triton.jit
def _slots_used(slot, QUERY_SLOTS: tl.constexpr, QUERIES: tl.constexpr, heads_left):
    """Which slots of a block of kv heads belong to a query head."""
    head = slot // QUERY_SLOTS * QUERIES + slot % QUERY_SLOTS
    return (slot % QUERY_SLOTS < QUERIES) & (head < heads_left)


@triton.jit
def _exact_tile(
    query, scales, up, bias, norm, position, frequencies, source, plane, at_scale, seen, up_stride, offset,
    rank, factor_rank, first_kv, kv_left, first_head, heads_left, first_bias, norm_epsilon,
    HEAD_DIM: tl.constexpr, KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr, SLOTS: tl.constexpr,
    RANK: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, ASSEMBLY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of tokens with all pairs rebuilt, [tokens, SLOTS]."""
    TILE: tl.constexpr = position.shape[0]
    WIDE: tl.constexpr = KV * CHUNK_PAIRS
    PART: tl.constexpr = 128 if RANK > 128 else RANK
    scale, shift = tl.zeros((TILE,), tl.float32) + 1.0, tl.zeros((TILE,), tl.float32)
    if BITS < 16:
        scale, shift = load_scales(scales, at_scale, seen, BITS, ASYMMETRIC)
    kv, pair = tl.arange(0, WIDE) // CHUNK_PAIRS, tl.arange(0, WIDE) % CHUNK_PAIRS
    score = tl.zeros((TILE, SLOTS), tl.float32)
    energy = tl.zeros((TILE, KV), tl.float32)
    for chunk in tl.range(0, HEAD_DIM // 2 // CHUNK_PAIRS, num_stages=1):
        first, second = tl.zeros((TILE, WIDE), tl.float32), tl.zeros((TILE, WIDE), tl.float32)
        for part in tl.range(0, RANK, PART, num_stages=1):
            x = load_latents(source, plane, seen[:, None], part, rank, dtype, BITS, PART, ASSEMBLY)
            x = _less(x, shift, ASYMMETRIC)
            factor = _key_factor(
                up, up_stride, offset, factor_rank, first_kv, kv_left, chunk, 0, part, HEAD_DIM, KV, PART
            ).to(dtype)
            first = tl.dot(x, factor, first, input_precision="ieee")
            factor = _key_factor(
                up, up_stride, offset, factor_rank, first_kv, kv_left, chunk, 1, part, HEAD_DIM, KV, PART
            ).to(dtype)
            second = tl.dot(x, factor, second, input_precision="ieee")
        if BITS < 16:
            first, second = first * scale[:, None], second * scale[:, None]
        dim = pair + chunk * CHUNK_PAIRS
        if HAS_BIAS:
            at = bias + first_bias + kv * HEAD_DIM + dim
            first += tl.load(at, mask=kv < kv_left, other=0.0).to(tl.float32)[None, :]
            second += tl.load(at + HEAD_DIM // 2, mask=kv < kv_left, other=0.0).to(tl.float32)[None, :]
        if HAS_NORM:
            energy += tl.sum(tl.reshape(first * first + second * second, (TILE, KV, CHUNK_PAIRS)), 2)
            first *= tl.load(norm + dim).to(tl.float32)[None, :]
            second *= tl.load(norm + dim + HEAD_DIM // 2).to(tl.float32)[None, :]
        frequency = tl.load(frequencies + chunk * CHUNK_PAIRS + tl.arange(0, CHUNK_PAIRS))
        cos, sin = _turn(position[:, None] * frequency[None, :])
        q_first, q_second = _query_factor(
            query, first_head, heads_left, chunk, HEAD_DIM, KV, QUERIES, QUERY_SLOTS, SLOTS
        )
        score = _rotated_scores(score, first, second, cos, sin, q_first.to(dtype), q_second.to(dtype), dtype, KV)
    if HAS_NORM:
        inverse = tl.rsqrt(energy / HEAD_DIM + norm_epsilon)
        of_slot = (tl.arange(0, KV)[:, None] == (tl.arange(0, SLOTS) // QUERY_SLOTS)[None, :]).to(tl.float32)
        score *= tl.sum(inverse[:, :, None] * of_slot[None, :, :], 1)
    return score


@triton.jit
def _exact_stretch(
    query, latents, scales, up, bias, norm, positions, frequencies, mask, scores, rank_of, offset_of, byte_of, plane_of,
    row, head_block, first, last, length, latents_b, latents_t, scales_b, scales_t, up_stride, positions_b, positions_t,
    mask_b, mask_t, stored, stored_from, norm_epsilon,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr, SLOTS: tl.constexpr, QUERY_ROWS: tl.constexpr,
    TILE: tl.constexpr, RANK: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
    DIVISOR: tl.constexpr,
):  # fmt: skip
    """Scores of the tokens first .. last with all pairs rebuilt."""
    head_blocks: tl.constexpr = (HEADS_PER_GROUP + KV - 1) // KV
    all_blocks: tl.constexpr = head_blocks * (KV_HEADS // HEADS_PER_GROUP)
    group, first_kv = head_block // head_blocks, head_block % head_blocks * KV
    kv_left = HEADS_PER_GROUP - first_kv
    first_head = (group * HEADS_PER_GROUP + first_kv) * QUERIES
    rank = tl.multiple_of(tl.load(rank_of + group), DIVISOR)
    byte = tl.multiple_of(tl.load(byte_of + group), DIVISOR * BITS // 8 if BITS < 16 else DIVISOR)
    factor_rank, offset = rank, tl.load(offset_of + group)
    if BITS < 16:
        factor_rank, offset = RANK, group * RANK
    at_row = row // QUERY_ROWS
    source = latents + at_row.to(tl.int64) * latents_b + byte
    plane = latents + at_row.to(tl.int64) * latents_b + tl.load(plane_of + group)
    slot_ok = _slots_used(tl.arange(0, SLOTS), QUERY_SLOTS, QUERIES, kv_left * QUERIES)
    for begin in tl.range(first, last, TILE, num_stages=1):
        token = begin + tl.arange(0, TILE)
        seen, added = _visible(mask, row * mask_b, token, mask_t, token < length, MASK)
        score = tl.zeros((TILE, SLOTS), tl.float32)
        if tl.max(seen.to(tl.int32), 0) > 0:
            at = positions + at_row * positions_b + token * positions_t
            position = tl.load(at, mask=seen, other=0).to(tl.float32)
            at_token = token[:, None].to(tl.int64) * latents_t
            score = _exact_tile(
                query + row * HEADS * HEAD_DIM, scales, up, bias, norm, position, frequencies,
                source + at_token, plane + at_token,
                at_row * scales_b + token * scales_t + group * (2 if ASYMMETRIC else 1), seen, up_stride, offset, rank,
                factor_rank, first_kv, kv_left, first_head, kv_left * QUERIES,
                (group * HEADS_PER_GROUP + first_kv) * HEAD_DIM, norm_epsilon, HEAD_DIM, KV, QUERIES, QUERY_SLOTS,
                SLOTS, RANK, BITS, ASYMMETRIC, ASSEMBLY, HAS_BIAS, HAS_NORM, DTYPE,
            )  # fmt: skip
        _store_scores(
            score, added, seen, token + stored_from, scores, (row * all_blocks + head_block).to(tl.int64), stored,
            slot_ok, SLOTS, MASK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "blocks", "rows_per_turn"])
def weight_kernel(
    query, latents, scales, up, bias, positions, frequencies, mask, starts, turns, weights, weight_biases, scores, rank_of,
    offset_of, byte_of, plane_of, length, blocks, latents_b, latents_t, scales_b, scales_t, up_stride, positions_b,
    positions_t, mask_b, mask_t, turns_b, rows_per_turn, stored, stored_from,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr, FAST: tl.constexpr, SLOW: tl.constexpr,
    COLUMNS: tl.constexpr, SPAN: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    SLOTS: tl.constexpr, QUERY_ROWS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
    MASK: tl.constexpr, HAS_BIAS: tl.constexpr, ASSEMBLY: tl.constexpr, DIVISOR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The slow pairs' matrices of TILES * ROWS / COLUMNS blocks for one query head: turns [a; b].

    The heads of a block of heads also share the blocks with gaps, whose scores are computed here with all pairs rebuilt.

    weights: [rows, blocks, head blocks, KV * QUERY_SLOTS * COLUMNS, RANK].
    """
    chunk, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = head // QUERIES
    group, member = kv_head // HEADS_PER_GROUP, kv_head % HEADS_PER_GROUP
    head_blocks: tl.constexpr = (HEADS_PER_GROUP + KV - 1) // KV
    head_block = group * head_blocks + member // KV
    all_blocks: tl.constexpr = head_blocks * (KV_HEADS // HEADS_PER_GROUP)
    place = member % KV * QUERY_SLOTS + head % QUERIES
    rank, offset = tl.load(rank_of + group), tl.load(offset_of + group)
    if BITS < 16:
        # The factor is in the order of the codes, every group as wide as the others.
        rank, offset = RANK, group * RANK
    slow = tl.arange(0, SLOW)
    slow_ok = slow < HEAD_DIM // 2 - FAST
    at_query = query + (row * HEADS + head) * HEAD_DIM + FAST + slow
    q_first = tl.load(at_query, mask=slow_ok, other=0.0).to(tl.float32)
    q_second = tl.load(at_query + HEAD_DIM // 2, mask=slow_ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        at_bias = bias + kv_head * HEAD_DIM + FAST + slow
        bias_first = tl.load(at_bias, mask=slow_ok, other=0.0).to(tl.float32)
        bias_second = tl.load(at_bias + HEAD_DIM // 2, mask=slow_ok, other=0.0).to(tl.float32)
        bias_a = q_first * bias_first + q_second * bias_second
        bias_b = q_second * bias_first - q_first * bias_second
    WIDE: tl.constexpr = KV * QUERY_SLOTS * COLUMNS
    PART: tl.constexpr = 128 if RANK > 128 else RANK
    for part in tl.range(0, RANK, PART, num_stages=1):
        latent = part + tl.arange(0, PART)
        ok = slow_ok[:, None] & (latent < rank)[None, :]
        source = up + ((member * HEAD_DIM + FAST + slow) * up_stride)[:, None] + offset + latent[None, :]
        first = tl.load(source, mask=ok, other=0.0).to(tl.float32)
        second = tl.load(source + HEAD_DIM // 2 * up_stride, mask=ok, other=0.0).to(tl.float32)
        a = (q_first[:, None] * first + q_second[:, None] * second).to(DTYPE)
        b = (q_second[:, None] * first - q_first[:, None] * second).to(DTYPE)
        for tile in tl.range(0, TILES, num_stages=3):
            index = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
            block = index // COLUMNS
            row_ok = block < blocks
            at_turn = turns + row // rows_per_turn * turns_b + index[:, None] * (2 * SLOW) + slow[None, :]
            w = tl.dot(tl.load(at_turn, mask=row_ok[:, None], other=0.0), a, input_precision="ieee")
            w = tl.dot(tl.load(at_turn + SLOW, mask=row_ok[:, None], other=0.0), b, w, input_precision="ieee")
            out = ((row * blocks + block).to(tl.int64) * all_blocks + head_block) * WIDE
            out += place * COLUMNS + index % COLUMNS
            tl.store(weights + out[:, None] * RANK + latent[None, :], w.to(DTYPE), mask=row_ok[:, None])
            if HAS_BIAS:
                if part == 0:
                    along_a = tl.load(at_turn, mask=row_ok[:, None], other=0.0).to(tl.float32)
                    along_b = tl.load(at_turn + SLOW, mask=row_ok[:, None], other=0.0).to(tl.float32)
                    added = tl.sum(along_a * bias_a[None, :] + along_b * bias_b[None, :], 1)
                    tl.store(weight_biases + out, added, mask=row_ok)
    sharers = tl.minimum(HEADS_PER_GROUP - member // KV * KV, KV) * QUERIES
    TOGETHER: tl.constexpr = TILES * ROWS // COLUMNS
    last = tl.minimum(blocks, (chunk + 1) * TOGETHER)
    for block in tl.range(chunk * TOGETHER + member % KV * QUERIES + head % QUERIES, last, sharers, num_stages=1):
        if tl.load(starts + row // rows_per_turn * blocks + block) == GAPS:
            _exact_stretch(
                query, latents, scales, up, bias, up, positions, frequencies, mask, scores, rank_of, offset_of, byte_of,
                plane_of, row, head_block, block * SPAN, tl.minimum(length, (block + 1) * SPAN), length, latents_b,
                latents_t, scales_b, scales_t, up_stride, positions_b, positions_t, mask_b, mask_t, stored, stored_from,
                0.0, HEAD_DIM, HEADS, KV_HEADS, HEADS_PER_GROUP, KV, QUERIES, QUERY_SLOTS, SLOTS, QUERY_ROWS, TILE,
                RANK, BITS, ASYMMETRIC, MASK, HAS_BIAS, False, DTYPE, ASSEMBLY, DIVISOR,
            )  # fmt: skip


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
            _less(more, shift, ASYMMETRIC), tl.load(at, mask=column_ok[None, :], other=0.0), product,
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
        factor = _key_factor(up, up_stride, offset, factor_rank, first_kv, kv_left, chunk, half, part, HEAD_DIM, KV, 128)
        product = tl.dot(_less(more, shift, ASYMMETRIC), factor.to(dtype), product, input_precision="ieee")
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
    x = _less(x, shift, ASYMMETRIC)
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
        if KEPT:
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
        score = _rotated_scores(score, first, second, c, s, q_first[chunk], q_second[chunk], dtype, KV)
    return score


@triton.jit
def score_program(
    query, latents, scales, up, bias, norm, cos, sin, positions, frequencies, basis, mask,
    starts, weights, weight_biases, value_scales, scores, output, stats, rank_of, offset_of, byte_of, plane_of,
    row, head_block, first_block, block_step, length, blocks,
    latents_b, latents_t, scales_b, scales_t, up_stride, table_b, table_t, positions_b, positions_t, mask_b, mask_t,
    value_scales_b, value_scales_t, rows_per_start, stored, stored_from, all_pieces, first_piece, norm_epsilon,
    MODE: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr, KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr,
    SLOTS: tl.constexpr, QUERY_ROWS: tl.constexpr, FAST: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr, QUERY_STRIDE: tl.constexpr, BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr, MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    VALUE_GROUP: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_ASYMMETRIC: tl.constexpr, RAW: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, DIVISOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of KV kv heads' queries for the pieces first_block, first_block + block_step, ... of the tokens.

    A piece is PIECE = SPAN // PIECES tokens of one block. scores: base-2 logarithms of weights (`query` carries the
    scaling and log2(e)), float32 [rows, head blocks, SLOTS, stored]. Unless RAW, output: softmax weights relative to
    the largest of each piece, and stats [rows, head blocks, pieces, 3, SLOTS]: that, their sum, and their sum with
    the values' zero points. MODE: "interpolated", "exact" (all pairs rebuilt), or "absorbed" (no rotation, the query
    already multiplied with the up factor: [rows, HEADS, QUERY_STRIDE]).
    """
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
    first_source = latents + at_row.to(tl.int64) * latents_b + byte
    first_plane = latents + at_row.to(tl.int64) * latents_b + tl.load(plane_of + group)
    slot = tl.arange(0, SLOTS)
    slot_head = slot // QUERY_SLOTS * QUERIES + slot % QUERY_SLOTS
    slot_ok = _slots_used(slot, QUERY_SLOTS, QUERIES, heads_left)
    used = tl.arange(0, KV * QUERY_SLOTS)
    used_head = first_head + used // QUERY_SLOTS * QUERIES + used % QUERY_SLOTS
    value_group = tl.where(_slots_used(used, QUERY_SLOTS, QUERIES, heads_left), used_head // VALUE_GROUP, 0)
    out = (row * all_blocks + head_block).to(tl.int64)
    PART: tl.constexpr = 128 if RANK > 128 else RANK
    KEPT: tl.constexpr = RANK <= 128
    WIDE: tl.constexpr = KV * QUERY_SLOTS * COLUMNS

    factors, q_first, q_second, gather = (), (), (), ()
    if MODE == "interpolated":
        for chunk in tl.static_range(FAST // CHUNK_PAIRS):
            first, second = _query_factor(
                query + row * HEADS * HEAD_DIM, first_head, heads_left, chunk, HEAD_DIM, KV, QUERIES, QUERY_SLOTS, SLOTS
            )
            q_first, q_second = q_first + (first.to(dtype),), q_second + (second.to(dtype),)
            if KEPT:
                for half in tl.static_range(2):
                    factor = _key_factor(
                        up, up_stride, offset, factor_rank, first_kv, kv_left, chunk, half, 0, HEAD_DIM, KV, PART
                    )
                    factors = factors + (factor.to(dtype),)
        gather = gather + (((tl.arange(0, WIDE) // COLUMNS)[:, None] == slot[None, :]).to(dtype),)
    if MODE == "absorbed":
        at_query = query + ((row * HEADS + first_head + slot_head) * QUERY_STRIDE)[None, :]
        for part in tl.static_range(0, RANK, PART):
            latent = part + tl.arange(0, PART)
            ok = (latent < factor_rank)[:, None] & slot_ok[None, :]
            factors = factors + (tl.load(at_query + latent[:, None], mask=ok, other=0.0).to(dtype),)

    for piece in tl.range(first_block, tl.cdiv(length, PIECE), block_step, num_stages=1):
        block = piece // PIECES
        last = tl.minimum(PIECE // TILE, tl.cdiv(length - piece * PIECE, TILE))
        start = 0
        if MODE == "interpolated":
            start = tl.load(starts + row // rows_per_start * blocks + block)
        if MODE == "exact":
            _exact_stretch(
                query, latents, scales, up, bias, norm, positions, frequencies, mask, scores, rank_of, offset_of,
                byte_of, plane_of, row, head_block, piece * PIECE, piece * PIECE + last * TILE, length, latents_b,
                latents_t, scales_b, scales_t, up_stride, positions_b, positions_t, mask_b, mask_t, stored, stored_from,
                norm_epsilon, HEAD_DIM, HEADS, KV_HEADS, HEADS_PER_GROUP, KV, QUERIES, QUERY_SLOTS, SLOTS, QUERY_ROWS,
                TILE, RANK, BITS, ASYMMETRIC, MASK, HAS_BIAS, HAS_NORM, DTYPE, ASSEMBLY, DIVISOR,
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
                column_ok = _slots_used(column // COLUMNS, QUERY_SLOTS, QUERIES, heads_left)
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
                        x = _less(x, shift, ASYMMETRIC)
                        score = tl.dot(x, factors[part // PART], score, input_precision="ieee")
                    if BITS < 16:
                        score *= scale[:, None]
                else:
                    at_table = at_row * table_b + token[:, None] * table_t
                    along = piece % PIECES * PIECE + tile * TILE + inside
                    score = _interpolated_tile(
                        factors, q_first, q_second, slow, gather[0], slow_biases, column_ok, scale, shift, up, bias, cos,
                        sin,
                        basis, weights, at_weights, source, plane, at_table, along, token, ok, up_stride,
                        offset, rank, factor_rank, first_kv, kv_left, first_bias, HEAD_DIM, KV, QUERY_SLOTS, FAST, COLUMNS, RANK,
                        BITS, ASYMMETRIC, ASSEMBLY, HAS_BIAS, dtype,
                    )  # fmt: skip
                seen, added = _visible(mask, row * mask_b, token, mask_t, ok, MASK)
                _store_scores(
                    score, added, seen, token + stored_from, scores, out, stored, slot_ok, SLOTS, MASK,
                )  # fmt: skip
        if not RAW:
            # The piece's scores have been written by other threads of this program.
            tl.debug_barrier()
            _make_weights(
                scores, output, stats, value_scales, at_row * value_scales_b, value_scales_t, value_group,
                out, piece * PIECE, piece * PIECE + last * TILE, stored, stored_from, first_piece + piece, all_pieces,
                SLOTS, KV * QUERY_SLOTS, PIECE, VALUE_BITS, VALUE_ASYMMETRIC,
            )  # fmt: skip


@triton.jit(do_not_specialize=["length", "blocks", "block_step", "all_pieces", "first_piece", "rows_per_start"])
def scores_kernel(
    query, latents, scales, up, bias, norm, cos, sin, positions, frequencies, basis, mask,
    starts, weights, weight_biases, value_scales, scores, output, stats, rank_of, offset_of, byte_of, plane_of,
    block_step, length, blocks,
    latents_b, latents_t, scales_b, scales_t, up_stride, table_b, table_t, positions_b, positions_t, mask_b, mask_t,
    value_scales_b, value_scales_t, rows_per_start, stored, stored_from, all_pieces, first_piece, norm_epsilon,
    MODE: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr, KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr,
    SLOTS: tl.constexpr, QUERY_ROWS: tl.constexpr, FAST: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr, QUERY_STRIDE: tl.constexpr, BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr, MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    VALUE_GROUP: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_ASYMMETRIC: tl.constexpr, RAW: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, DIVISOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`score_program` on a grid of pieces of the tokens x head blocks x rows."""
    score_program(
        query, latents, scales, up, bias, norm, cos, sin, positions, frequencies, basis, mask,
        starts, weights, weight_biases, value_scales, scores, output, stats, rank_of, offset_of, byte_of, plane_of,
        tl.program_id(2), tl.program_id(1), tl.program_id(0), block_step, length, blocks,
        latents_b, latents_t, scales_b, scales_t, up_stride, table_b, table_t, positions_b, positions_t, mask_b,
        mask_t, value_scales_b, value_scales_t, rows_per_start, stored, stored_from, all_pieces, first_piece, norm_epsilon,
        MODE, HEAD_DIM, HEADS, KV_HEADS, HEADS_PER_GROUP, KV, QUERIES, QUERY_SLOTS, SLOTS, QUERY_ROWS, FAST, COLUMNS,
        SPAN, PIECES, PIECE, TILE, RANK, QUERY_STRIDE, BITS, ASYMMETRIC, MASK, HAS_BIAS, HAS_NORM, VALUE_GROUP, VALUE_BITS,
        VALUE_ASYMMETRIC, RAW, DTYPE, ASSEMBLY, DIVISOR, STAGES,
    )  # fmt: skip
