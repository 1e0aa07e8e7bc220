"""Triton kernels of decode attention over latents, split over the tokens (flash-decoding, arXiv 2311.01282).

`scores_kernel` rebuilds and rotates keys and multiplies them with the query; `values_kernel` weighs the value latents
of a range of tokens by their softmax weights, relative to the largest score of all; `combine_kernel` adds up the
ranges. Scores are the only intermediate that is as long as the context: 4 bytes per token and head.

Packed latents are multiplied as codes, less the middle code `m`: `x = s (c - m - z)`, so the scale `s` multiplies
rebuilt keys or weights, and the shift `z` meets the up factor's row sums or the sum of the weights.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _plane(source, tokens_ok, column, rank, PLANE: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes of one bit plane, int32 [tokens, COLUMNS] from code `column` (a multiple of 8) on; zero beyond `rank`.

    source: pointers [tokens, 1] to the first byte of the group's plane. A byte's codes lie from its low end upwards.
    """
    PER: tl.constexpr = 8 // PLANE
    index = column // PER + tl.arange(0, COLUMNS // PER)
    ok = tokens_ok[:, None] & (index < rank // PER)[None, :]
    codes = tl.load(source + index[None, :], mask=ok, other=0).to(tl.int32)
    top: tl.constexpr = (1 << PLANE) - 1
    if PLANE == 4:
        codes = tl.join(codes & top, codes >> 4)
    elif PLANE == 2:
        codes = tl.join(tl.join(codes & top, (codes >> 4) & top), tl.join((codes >> 2) & top, codes >> 6))
    elif PLANE == 1:
        even = tl.join(tl.join(codes & 1, (codes >> 4) & 1), tl.join((codes >> 2) & 1, (codes >> 6) & 1))
        odd = tl.join(tl.join((codes >> 1) & 1, (codes >> 5) & 1), tl.join((codes >> 3) & 1, codes >> 7))
        codes = tl.join(even, odd)
    return tl.reshape(codes, (tokens_ok.shape[0], COLUMNS))


@triton.jit
def _latents(
    source, tokens_ok, offset, column, rank, dtype: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Latents, or codes less the middle one, [tokens, COLUMNS] of a group from its latent `column` on.

    source: pointers [tokens, 1] to the tokens' first byte or latent; offset: the group's first latent.
    """
    index = column + tl.arange(0, COLUMNS)
    inside = tokens_ok[:, None] & (index < rank)[None, :]
    if BITS == 16:
        latents = tl.load(source + offset + index[None, :], mask=inside, other=0.0)
    elif BITS == 3:
        low = _plane(source + offset // 4, tokens_ok, column, rank, 2, COLUMNS)
        high = _plane(source + (WIDTH * 2 + 7) // 8 + offset // 8, tokens_ok, column, rank, 1, COLUMNS)
        latents = tl.where(inside, low + high * 4 - 4, 0).to(dtype)
    else:
        codes = _plane(source + offset * BITS // 8, tokens_ok, column, rank, BITS, COLUMNS)
        latents = tl.where(inside, codes - (1 << (BITS - 1)), 0).to(dtype)
    return latents


@triton.jit
def _nibbles(packed, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The codes in the low and in the high halves of bytes, less the middle one, 8: two blocks of the bytes' shape.

    The assembly makes fp16 of four bytes at a time: a code or-ed into the mantissa of 1024 is 1024 + code, in the next
    four bits it is 1024 + 16 code.
    """
    if ASSEMBLY:
        low_codes, high_codes = tl.inline_asm_elementwise(
            """
            { .reg .b32 first, second, low, sixteenth, high;
              prmt.b32 first, $4, 0, 0x4140;
              prmt.b32 second, $4, 0, 0x4342;
              lop3.b32 $0, first, 0x000f000f, 0x64006400, 0xea;
              lop3.b32 $1, second, 0x000f000f, 0x64006400, 0xea;
              lop3.b32 $2, first, 0x00f000f0, 0x64006400, 0xea;
              lop3.b32 $3, second, 0x00f000f0, 0x64006400, 0xea;
              mov.b32 low, 0x64086408;
              mov.b32 sixteenth, 0x2c002c00;
              mov.b32 high, 0xd480d480;
              sub.f16x2 $0, $0, low;
              sub.f16x2 $1, $1, low;
              fma.rn.f16x2 $2, $2, sixteenth, high;
              fma.rn.f16x2 $3, $3, sixteenth, high; }
            """,
            "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        codes = packed.to(tl.int32)
        low_codes, high_codes = ((codes & 15) - 8).to(dtype), ((codes >> 4) - 8).to(dtype)
    return low_codes, high_codes


@triton.jit
def _bytes(packed, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Bytes less the middle one, 128; the assembly as in `_nibbles`."""
    if ASSEMBLY:
        codes = tl.inline_asm_elementwise(
            """
            { .reg .b32 middle;
              prmt.b32 $0, $2, 0x64646464, 0x4140;
              prmt.b32 $1, $2, 0x64646464, 0x4342;
              mov.b32 middle, 0x64806480;
              sub.f16x2 $0, $0, middle;
              sub.f16x2 $1, $1, middle; }
            """,
            "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        codes = (packed.to(tl.int32) - 128).to(dtype)
    return codes


@triton.jit(do_not_specialize=["length", "peaks_start", "peaks_count", "blocks_per_program"])
def scores_kernel(
    query, latents, scales, zeros, up, bias, norm, cos, sin, mask, scores, peaks, rank_of, offset_of,
    length, latents_b, latents_t, scales_b, scales_t, up_stride, table_b, table_t, mask_b, mask_t,
    scores_length, scores_start, peaks_start, peaks_count, blocks_per_program, norm_epsilon,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, QUERIES: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    KV_HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, MASK: tl.constexpr,
    BLOCK_RANK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """Scores of one kv head's QUERIES query heads for some blocks of tokens, and their maximum over each block.

    `q . R_t norm(B c_t + b)` for every token t, as base-2 logarithms of the weights; `query` carries the scaling and
    the factor log2(e). Accumulated in float32; rotated keys are rounded to the dtype of `up` before they meet `query`.
    """
    program, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = head // HEADS_PER_GROUP
    # Saying of what ranks are multiples lets loads be wide.
    rank = tl.multiple_of(tl.load(rank_of + group), DIVISOR)
    offset = tl.multiple_of(tl.load(offset_of + group), DIVISOR)
    dim = tl.arange(0, HALF)
    dims_ok = dim < HEAD_DIM // 2
    factor = up + ((head % HEADS_PER_GROUP) * HEAD_DIM + dim)[None, :] * up_stride + offset
    partner = factor + HEAD_DIM // 2 * up_stride
    dtype: tl.constexpr = up.dtype.element_ty
    wanted = tl.arange(0, BLOCK_QUERIES)
    q_head = row * KV_HEADS * QUERIES + head * QUERIES + wanted
    at_query = query + (q_head * HEAD_DIM)[None, :] + dim[:, None]
    query_ok = (wanted < QUERIES)[None, :] & dims_ok[:, None]
    q_first = tl.load(at_query, mask=query_ok, other=0.0)
    q_second = tl.load(at_query + HEAD_DIM // 2, mask=query_ok, other=0.0)
    column = tl.arange(0, BLOCK_RANK)[:, None]
    factor_first = tl.load(factor + column, mask=(column < rank) & dims_ok[None, :], other=0.0)
    factor_second = tl.load(partner + column, mask=(column < rank) & dims_ok[None, :], other=0.0)
    first_sum = tl.sum(factor_first.to(tl.float32), 0)
    second_sum = tl.sum(factor_second.to(tl.float32), 0)
    if CHUNKS > 1:
        for chunk in range(1, CHUNKS):
            more = chunk * BLOCK_RANK + column
            ok = (more < rank) & dims_ok[None, :]
            first_sum += tl.sum(tl.load(factor + more, mask=ok, other=0.0).to(tl.float32), 0)
            second_sum += tl.sum(tl.load(partner + more, mask=ok, other=0.0).to(tl.float32), 0)
    last = tl.minimum((program + 1) * blocks_per_program, tl.cdiv(length, BLOCK))
    for block in tl.range(program * blocks_per_program, last, num_stages=STAGES):
        token = block * BLOCK + tl.arange(0, BLOCK)
        tokens_ok = token < length
        source = latents + row.to(tl.int64) * latents_b + token[:, None].to(tl.int64) * latents_t
        x = _latents(source, tokens_ok, offset, 0, rank, dtype, BITS, WIDTH, BLOCK_RANK)
        first = tl.dot(x, factor_first, input_precision="ieee")
        second = tl.dot(x, factor_second, input_precision="ieee")
        if CHUNKS > 1:
            for chunk in tl.range(1, CHUNKS, num_stages=1):
                x = _latents(source, tokens_ok, offset, chunk * BLOCK_RANK, rank, dtype, BITS, WIDTH, BLOCK_RANK)
                more = chunk * BLOCK_RANK + column
                ok = (more < rank) & dims_ok[None, :]
                first = tl.dot(x, tl.load(factor + more, mask=ok, other=0.0), first, input_precision="ieee")
                second = tl.dot(x, tl.load(partner + more, mask=ok, other=0.0), second, input_precision="ieee")
        if BITS < 16:
            at = row * scales_b + token * scales_t + group
            scale = tl.load(scales + at, mask=tokens_ok, other=0.0).to(tl.float32)[:, None]
            if ASYMMETRIC:
                shift = tl.load(zeros + at, mask=tokens_ok, other=0.0).to(tl.float32)[:, None] - (1 << (BITS - 1))
                first -= shift * first_sum[None, :]
                second -= shift * second_sum[None, :]
            first *= scale
            second *= scale
        if HAS_BIAS:
            at_bias = bias + head * HEAD_DIM + dim[None, :]
            first += tl.load(at_bias, mask=dims_ok[None, :], other=0.0).to(tl.float32)
            second += tl.load(at_bias + HEAD_DIM // 2, mask=dims_ok[None, :], other=0.0).to(tl.float32)
        if HAS_NORM:
            energy = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            inverse = tl.rsqrt(energy / HEAD_DIM + norm_epsilon)[:, None]
            at_norm = norm + dim[None, :]
            first *= inverse * tl.load(at_norm, mask=dims_ok[None, :], other=0.0).to(tl.float32)
            second *= inverse * tl.load(at_norm + HEAD_DIM // 2, mask=dims_ok[None, :], other=0.0).to(tl.float32)
        table = row * table_b + token[:, None] * table_t + dim[None, :]
        table_ok = tokens_ok[:, None] & dims_ok[None, :]
        c = tl.load(cos + table, mask=table_ok, other=0.0).to(tl.float32)
        s = tl.load(sin + table, mask=table_ok, other=0.0).to(tl.float32)
        score = tl.dot((first * c - second * s).to(dtype), q_first, input_precision="ieee")
        score = tl.dot((second * c + first * s).to(dtype), q_second, score, input_precision="ieee")
        if MASK == "bool":
            visible = tl.load(mask + row * mask_b + token * mask_t, mask=tokens_ok, other=0) != 0
            score = tl.where(visible[:, None], score, -1e30)
        elif MASK == "additive":
            added = tl.load(mask + row * mask_b + token * mask_t, mask=tokens_ok, other=0.0).to(tl.float32)
            score += tl.maximum(added * LOG2_E, -1e30)[:, None]
        score = tl.where(tokens_ok[:, None], score, float("-inf"))
        out = scores + q_head[None, :].to(tl.int64) * scores_length + scores_start + token[:, None]
        tl.store(out, score, mask=tokens_ok[:, None] & (wanted < QUERIES)[None, :])
        tl.store(peaks + q_head * peaks_count + peaks_start + block, tl.max(score, 0), mask=wanted < QUERIES)


@triton.jit(do_not_specialize=["length", "peaks_count", "blocks_per_split", "first_split"])
def values_kernel(
    scores, peaks, latents, scales, zeros, sums, totals, rank_of, offset_of, chunk_group, chunk_column,
    length, latents_b, latents_t, scales_b, scales_t, scores_length, scores_start, peaks_count,
    blocks_per_split, first_split,
    HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, BLOCK_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    RANK_STRIDE: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PEAKS: tl.constexpr,
):  # fmt: skip
    """`sum_t w_t x_t` of one group's heads over one range of tokens and one chunk of its latents.

    `w_t = 2^(s_t - peak)` with the largest score of all tokens, so that ranges simply add up. `sums`: float32
    [splits, rows, HEADS, RANK_STRIDE]; `totals`: the sums of the weights, float32 [splits, rows, HEADS].
    """
    split, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group, column = tl.load(chunk_group + chunk), tl.multiple_of(tl.load(chunk_column + chunk), 32)
    index = column + tl.arange(0, BLOCK_RANK)
    byte = column // 2 + tl.arange(0, BLOCK_RANK // 2)
    # Saying of what ranks are multiples lets loads be wide.
    rank = tl.multiple_of(tl.load(rank_of + group), DIVISOR)
    offset = tl.multiple_of(tl.load(offset_of + group), DIVISOR)
    member = tl.arange(0, BLOCK_HEADS)
    heads_ok = member < HEADS_PER_GROUP
    head = row * HEADS + group * HEADS_PER_GROUP + member
    peak = tl.full((BLOCK_HEADS,), float("-inf"), tl.float32)
    for start in range(0, peaks_count, BLOCK_PEAKS):
        at = start + tl.arange(0, BLOCK_PEAKS)
        ok = heads_ok[:, None] & (at < peaks_count)[None, :]
        found = tl.load(peaks + head[:, None] * peaks_count + at[None, :], mask=ok, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(found, 1))
    peak = tl.where(heads_ok, peak, 0.0)
    # Of 4-bit codes the even and the odd ones are summed apart, so that nothing has to be interleaved.
    total = tl.zeros((BLOCK_HEADS, BLOCK_RANK // 2 if BITS == 4 else BLOCK_RANK), tl.float32)
    odd_total = tl.zeros((BLOCK_HEADS, BLOCK_RANK // 2 if BITS == 4 else 1), tl.float32)
    weight_sum = tl.zeros((BLOCK_HEADS,), tl.float32)
    shift_sum = tl.zeros((BLOCK_HEADS,), tl.float32)
    for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, tl.cdiv(length, BLOCK))):
        token = block * BLOCK + tl.arange(0, BLOCK)
        tokens_ok = token < length
        at_score = scores + head[:, None].to(tl.int64) * scores_length + scores_start + token[None, :]
        ok = heads_ok[:, None] & tokens_ok[None, :]
        weights = tl.exp2(tl.load(at_score, mask=ok, other=float("-inf")) - peak[:, None])
        weight_sum += tl.sum(weights, 1)
        if BITS < 16:
            at = row * scales_b + token * scales_t + group
            weights *= tl.load(scales + at, mask=tokens_ok, other=0.0).to(tl.float32)[None, :]
        rounded = weights.to(DTYPE)
        if ASYMMETRIC:
            shift = tl.load(zeros + at, mask=tokens_ok, other=0.0).to(tl.float32) - (1 << (BITS - 1))
            shift_sum += tl.sum(rounded.to(tl.float32) * shift[None, :], 1)
        source = latents + row.to(tl.int64) * latents_b + token[:, None].to(tl.int64) * latents_t
        if BITS == 4:
            inside = tokens_ok[:, None] & (byte < rank // 2)[None, :]
            packed = tl.load(source + offset // 2 + byte[None, :], mask=inside, other=0)
            even, odd = _nibbles(packed, DTYPE, ASSEMBLY)
            total = tl.dot(rounded, even, total, input_precision="ieee")
            odd_total = tl.dot(rounded, odd, odd_total, input_precision="ieee")
        elif BITS == 8:
            inside = tokens_ok[:, None] & (index < rank)[None, :]
            packed = tl.load(source + offset + index[None, :], mask=inside, other=0)
            total = tl.dot(rounded, _bytes(packed, DTYPE, ASSEMBLY), total, input_precision="ieee")
        else:
            x = _latents(source, tokens_ok, offset, column, rank, DTYPE, BITS, WIDTH, BLOCK_RANK)
            total = tl.dot(rounded, x, total, input_precision="ieee")
    if ASYMMETRIC:
        total -= shift_sum[:, None]
    at = (first_split + split) * tl.num_programs(2) * HEADS + head
    tl.store(totals + at, weight_sum, mask=heads_ok)
    out = sums + at[:, None].to(tl.int64) * RANK_STRIDE
    if BITS == 4:
        if ASYMMETRIC:
            odd_total -= shift_sum[:, None]
        ok = heads_ok[:, None] & (byte < rank // 2)[None, :]
        tl.store(out + byte[None, :] * 2, total, mask=ok)
        tl.store(out + byte[None, :] * 2 + 1, odd_total, mask=ok)
    else:
        tl.store(out + index[None, :], total, mask=heads_ok[:, None] & (index < rank)[None, :])


@triton.jit(do_not_specialize=["splits", "row_heads"])
def combine_kernel(
    sums, totals, output, rank_of, splits, row_heads,
    HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, RANK_STRIDE: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """Mean latents of one head: the ranges' sums over their weights. output: [rows * HEADS, RANK_STRIDE]."""
    head, column = tl.program_id(0), tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    rank = tl.load(rank_of + (head % HEADS) // HEADS_PER_GROUP)
    total = tl.zeros((BLOCK_RANK,), tl.float32)
    weight = 0.0
    for split in range(splits):
        at = (split * row_heads + head).to(tl.int64)
        weight += tl.load(totals + at)
        total += tl.load(sums + at * RANK_STRIDE + column, mask=column < rank, other=0.0)
    tl.store(output + head * RANK_STRIDE + column, (total / weight).to(output.dtype.element_ty), mask=column < rank)
