"""Pieces that the score kernels share: queries and factors, masks, scales, and tiles with all pairs rebuilt."""

import triton
import triton.language as tl

from palu.kernels.codes import load_latents

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# What `turn_kernel` says of a block besides the position before its first token.
HIDDEN: tl.constexpr = tl.constexpr(-(1 << 30))
GAPS: tl.constexpr = tl.constexpr(1 << 30)
# Masks that add less than this hide a token.
HIDING: tl.constexpr = tl.constexpr(-30000.0)
CHUNK_PAIRS: tl.constexpr = tl.constexpr(16)


@triton.jit
def turn(angle):
    """cos and sin of float32 angles, to 1e-7: reduced to a quarter turn in three parts, then the Cephes polynomials.

    Many quarters times the first part have more digits than float32: the product must not be rounded.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = tl.fma(quarters, -1.5703125, angle)
    rest = tl.fma(quarters, -4.837512969970703e-4, rest)
    rest = tl.fma(quarters, -7.549789948768648e-8, rest)
    square = rest * rest
    sine = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cosine = (
        1.0
        - 0.5 * square
        + square * square * (4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5))
    )
    quadrant = quarters.to(tl.int32)
    swapped = (quadrant & 1) != 0
    cos = tl.where(swapped, sine, cosine)
    sin = tl.where(swapped, cosine, sine)
    cos = tl.where(((quadrant + 1) & 2) != 0, -cos, cos)
    sin = tl.where((quadrant & 2) != 0, -sin, sin)
    return cos, sin


@triton.jit
def visible_tokens(mask, row_mask, token, mask_t, ok, MASK: tl.constexpr):
    """Whether tokens may be attended to, and what is added to their scores (base-2 logarithm)."""
    seen, added = ok, tl.zeros(token.shape, tl.float32)
    if MASK == "bool":
        seen = ok & (tl.load(mask + row_mask + token * mask_t, mask=ok, other=0) != 0)
    elif MASK == "additive":
        added = tl.load(mask + row_mask + token * mask_t, mask=ok, other=0.0).to(tl.float32)
        seen = ok & (added > HIDING)
        added = tl.maximum(added, HIDING) * LOG2_E
    return seen, added


@triton.jit
def slots_used(slot, QUERY_SLOTS: tl.constexpr, QUERIES: tl.constexpr, heads_left):
    """Which slots of a block of kv heads belong to a query head."""
    head = slot // QUERY_SLOTS * QUERIES + slot % QUERY_SLOTS
    return (slot % QUERY_SLOTS < QUERIES) & (head < heads_left)


@triton.jit
def key_factor(
    up, up_stride, offset, rank, first_kv, kv_left, chunk, half, part,
    HEAD_DIM: tl.constexpr, KV: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Rows of the up factor that rebuild one half of CHUNK_PAIRS pairs of KV heads, [RANK, KV * CHUNK_PAIRS]."""
    column = tl.arange(0, KV * CHUNK_PAIRS)
    kv, pair = column // CHUNK_PAIRS, column % CHUNK_PAIRS
    dim = (first_kv + kv) * HEAD_DIM + half * (HEAD_DIM // 2) + pair + chunk * CHUNK_PAIRS
    latent = part + tl.arange(0, RANK)
    ok = (latent < rank)[:, None] & (kv < kv_left)[None, :]
    return tl.load(up + (dim * up_stride)[None, :] + offset + latent[:, None], mask=ok, other=0.0)


@triton.jit
def query_factor(
    query, scaling, first_head, heads_left, chunk,
    HEAD_DIM: tl.constexpr, KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The queries' CHUNK_PAIRS pairs, a block per kv head on the diagonal: twice [KV * CHUNK_PAIRS, SLOTS]."""
    row, slot = tl.arange(0, KV * CHUNK_PAIRS), tl.arange(0, SLOTS)
    kv, wanted = slot // QUERY_SLOTS, slot % QUERY_SLOTS
    head = kv * QUERIES + wanted
    ok = (row // CHUNK_PAIRS)[:, None] == kv[None, :]
    ok = ok & ((wanted < QUERIES) & (head < heads_left))[None, :]
    at = query + ((first_head + head) * HEAD_DIM)[None, :] + (row % CHUNK_PAIRS + chunk * CHUNK_PAIRS)[:, None]
    first = tl.load(at, mask=ok, other=0.0).to(tl.float32) * scaling
    second = tl.load(at + HEAD_DIM // 2, mask=ok, other=0.0).to(tl.float32) * scaling
    return first, second


@triton.jit
def paired_rows(chunk, kv_left, HEAD_DIM: tl.constexpr, KV: tl.constexpr, CHUNK: tl.constexpr):
    """Rows of the up factor that rebuild a chunk of pairs of KV heads, both dimensions of a pair side by side.

    [KV * CHUNK], from the first head's row 0 on; of heads that are not there those of the first.
    """
    column = tl.arange(0, KV * CHUNK)
    kv, place = column // CHUNK, chunk * CHUNK + column % CHUNK
    return tl.where(kv < kv_left, kv, 0) * HEAD_DIM + place // 2 + place % 2 * (HEAD_DIM // 2)


@triton.jit
def as_operand(turned):
    """Turned pairs [tokens, KV, pairs] as a product's left operand, in `operand_pair`'s order, so that none moves.

    A thread of the matrix units has every fourth of eight pairs, and is to have two neighbours.
    """
    KV: tl.constexpr = turned.shape[1]
    PAIRS: tl.constexpr = turned.shape[2]
    turned = tl.permute(tl.reshape(turned, (turned.shape[0], KV, PAIRS // 8, 2, 4)), (0, 1, 2, 4, 3))
    return tl.reshape(turned, (turned.shape[0], KV * PAIRS))


@triton.jit
def operand_pair(place):
    """The pair that stands at a place of `as_operand`."""
    return place // 8 * 8 + place % 2 * 4 + place % 8 // 2


@triton.jit
def paired_query(
    query, scaling, heads_left, chunk,
    HEAD_DIM: tl.constexpr, KV: tl.constexpr, QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr, SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """The queries' share in a chunk of turned pairs, a block per kv head on the diagonal: twice [KV * PAIRS, SLOTS]."""
    row, slot = tl.arange(0, KV * PAIRS), tl.arange(0, SLOTS)
    kv, wanted = slot // QUERY_SLOTS, slot % QUERY_SLOTS
    head, pair = kv * QUERIES + wanted, chunk * PAIRS + operand_pair(row % PAIRS)
    ok = ((row // PAIRS)[:, None] == kv[None, :]) & slots_used(slot, QUERY_SLOTS, QUERIES, heads_left)[None, :]
    at = query + (head * HEAD_DIM)[None, :] + pair[:, None]
    first = tl.load(at, mask=ok, other=0.0).to(tl.float32) * scaling
    second = tl.load(at + HEAD_DIM // 2, mask=ok, other=0.0).to(tl.float32) * scaling
    return first, second


@triton.jit
def rotated_scores(
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
def load_scale_words(scales, at, ok, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """As `load_scales`, each pair as one word: for loads that are not copied asynchronously."""
    if ASYMMETRIC:
        word = tl.load((scales + at).to(tl.pointer_type(tl.int32)), mask=ok, other=0x3C00)
        scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        shift = tl.where(ok, zero - (1 << (BITS - 1)), 0.0)
    else:
        scale = tl.load(scales + at, mask=ok, other=1.0).to(tl.float32)
        shift = tl.zeros(at.shape, tl.float32)
    return scale, shift


@triton.jit
def less_zero_points(x, shift, ASYMMETRIC: tl.constexpr):
    """Codes less their zero points, so that only the scale is left to apply; as exact as latents in x's dtype."""
    return x - shift[:, None].to(x.dtype) if ASYMMETRIC else x


@triton.jit
def store_scores(score, added, seen, token, scores, out, stored, slot_ok, SLOTS: tl.constexpr, MASK: tl.constexpr):
    """Base-2 logarithms of weights, hidden tokens' at minus infinity."""
    if MASK == "additive":
        score += added[:, None]
    score = tl.where(seen[:, None], score, float("-inf"))
    at = (out * SLOTS + tl.arange(0, score.shape[1])[None, :]) * stored + token[:, None]
    tl.store(scores + at, score, mask=slot_ok[None, :])


@triton.jit
def _exact_tile(
    query, scaling, scales, up, bias, norm, position, frequencies, source, plane, at_scale, seen, up_stride, offset,
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
            x = less_zero_points(x, shift, ASYMMETRIC)
            factor = key_factor(
                up, up_stride, offset, factor_rank, first_kv, kv_left, chunk, 0, part, HEAD_DIM, KV, PART
            ).to(dtype)
            first = tl.dot(x, factor, first, input_precision="ieee")
            factor = key_factor(
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
        cos, sin = turn(position[:, None] * frequency[None, :])
        q_first, q_second = query_factor(
            query, scaling, first_head, heads_left, chunk, HEAD_DIM, KV, QUERIES, QUERY_SLOTS, SLOTS
        )
        score = rotated_scores(score, first, second, cos, sin, q_first.to(dtype), q_second.to(dtype), dtype, KV)
    if HAS_NORM:
        inverse = tl.rsqrt(energy / HEAD_DIM + norm_epsilon)
        # Not as one sum over products: Triton would make a matrix product of that, over KV numbers, which is wrong.
        of_slot = tl.zeros((TILE, SLOTS), tl.float32)
        for member in tl.static_range(KV):
            of_member = tl.sum(tl.where((tl.arange(0, KV) == member)[None, :], inverse, 0.0), 1)
            of_slot += tl.where((tl.arange(0, SLOTS) // QUERY_SLOTS == member)[None, :], of_member[:, None], 0.0)
        score *= of_slot
    return score


@triton.jit
def exact_stretch(
    query, latents, scales, up, bias, norm, positions, frequencies, mask, scores, rank_of, offset_of, byte_of, plane_of,
    row, head_block, first, last, length, latents_b, latents_t, scales_b, scales_t, up_stride, positions_b, positions_t,
    positions_g, mask_b, mask_t, stored, stored_from, norm_epsilon, scaling,
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
    factor_rank, offset = rank, tl.multiple_of(tl.load(offset_of + group), DIVISOR)
    if BITS < 16:
        factor_rank, offset = RANK, group * RANK
    at_row = row // QUERY_ROWS
    source = latents + at_row.to(tl.int64) * latents_b + byte
    plane = latents + at_row.to(tl.int64) * latents_b + tl.load(plane_of + group)
    slot_ok = slots_used(tl.arange(0, SLOTS), QUERY_SLOTS, QUERIES, kv_left * QUERIES)
    for begin in tl.range(first, last, TILE, num_stages=1):
        token = begin + tl.arange(0, TILE)
        seen, added = visible_tokens(mask, row * mask_b, token, mask_t, token < length, MASK)
        score = tl.zeros((TILE, SLOTS), tl.float32)
        if tl.max(seen.to(tl.int32), 0) > 0:
            at = positions + at_row * positions_b + token * positions_t + group * positions_g
            position = tl.load(at, mask=seen, other=0).to(tl.float32)
            at_token = token[:, None].to(tl.int64) * latents_t
            score = _exact_tile(
                query + row * HEADS * HEAD_DIM, scaling, scales, up, bias, norm, position, frequencies,
                source + at_token, plane + at_token,
                at_row * scales_b + token * scales_t + group * (2 if ASYMMETRIC else 1), seen, up_stride, offset, rank,
                factor_rank, first_kv, kv_left, first_head, kv_left * QUERIES,
                (group * HEADS_PER_GROUP + first_kv) * HEAD_DIM, norm_epsilon, HEAD_DIM, KV, QUERIES, QUERY_SLOTS,
                SLOTS, RANK, BITS, ASYMMETRIC, ASSEMBLY, HAS_BIAS, HAS_NORM, DTYPE,
            )  # fmt: skip
        store_scores(
            score, added, seen, token + stored_from, scores, (row * all_blocks + head_block).to(tl.int64), stored,
            slot_ok, SLOTS, MASK,
        )  # fmt: skip
