"""The half of the kernel that scores: folded queries times latents, tile after tile.

All columns of a block of heads, of fast pairs and of slow ones, are one matrix, of which the latents are multiplied
with one half at a time: while one half is multiplied, the products of the other are weighed. Columns stand in groups
of eight, as the matrix units' results lie in registers: [groups, heads, 8].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from palu.kernels.decode_attention.hopper.common import (
    TILE,
    WARPS,
    bits_of,
    copied_layout,
    copy_rows,
    load_words,
    synchronize,
    unpacked,
    words_layout,
)

HIDDEN: gl.constexpr = gl.constexpr(-(1 << 30))
GAPS: gl.constexpr = gl.constexpr(1 << 30)
HIDING: gl.constexpr = gl.constexpr(-30000.0)
LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def rows_layout(columns):
    """Rows of a tile as the matrix units' results have them, `columns` of each row shared out among four lanes."""
    each = columns // 4
    return gl.DistributedLinearLayout(
        [[0, 1 << bit] for bit in range(bits_of(each))] + [[8, 0]],
        [[0, each], [0, 2 * each], [1, 0], [2, 0], [4, 0]],
        [[16 << bit, 0] for bit in range(bits_of(WARPS.value))],
        [],
        [TILE.value, columns],
    )


@gluon.jit
def _load_table(table, tile, table_t, length, HALF: gl.constexpr, PLACES: gl.constexpr):
    """What the products of one half are weighed with, [tile, PLACES // 2], four lanes' numbers one after the other."""
    layout: gl.constexpr = rows_layout(PLACES // 2)
    # Behind the last token any numbers do.
    token = gl.minimum(tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, layout)), length - 1)
    place = HALF * (PLACES // 2) + gl.arange(0, PLACES // 2, gl.SliceLayout(0, layout))
    return gl.load(table + (token * table_t)[:, None] + place[None, :])


@gluon.jit
def _weighed(product, numbers, KV: gl.constexpr, PLACES: gl.constexpr):
    """A half's products [tile, columns] times numbers [tile, PLACES // 2], added up to [tile, KV, 8]."""
    GROUPS: gl.constexpr = PLACES // 16
    product = product.reshape([TILE, GROUPS, KV, 8])
    numbers = numbers.reshape([TILE, 4, GROUPS, 2]).permute([0, 2, 1, 3]).reshape([TILE, GROUPS, 8])
    numbers = gl.convert_layout(numbers, gl.SliceLayout(2, product.type.layout), assert_trivial=True)
    return gl.sum(product * numbers.to(gl.float32)[:, :, None, :], 1)


@gluon.jit
def _columns_at(source, ROWS: gl.constexpr, RANK: gl.constexpr):
    """Pointers to ROWS columns of RANK numbers each."""
    layout: gl.constexpr = copied_layout(RANK)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    latent = gl.arange(0, RANK, gl.SliceLayout(0, layout))
    return source + (row * RANK)[:, None] + latent[None, :]


@gluon.jit
def _masked(score, mask, row_mask, mask_t, token, length, MASK: gl.constexpr):
    """Scores [tile, KV] with hidden tokens at minus infinity, and with what an additive mask adds."""
    ok = token < length
    if MASK == "bool":
        ok = ok & (gl.load(mask + row_mask + token * mask_t, mask=ok, other=0) != 0)
    elif MASK == "additive":
        added = gl.load(mask + row_mask + token * mask_t, mask=ok, other=0.0).to(gl.float32)
        ok = ok & (added > HIDING)
        score += (gl.maximum(added, HIDING) * LOG2_E)[:, None]
    return gl.where(ok[:, None], score, float("-inf"))


@gluon.jit
def _scale_words(scales, first, scales_t, length, layout: gl.constexpr, ASYMMETRIC: gl.constexpr):
    """Scales and zero points of a tile's tokens, each pair as one word."""
    token = gl.minimum(first + gl.arange(0, TILE, layout), length - 1)
    at = scales + token * scales_t
    if ASYMMETRIC:
        word = gl.load(at.to(gl.pointer_type(gl.int32), bitcast=True))
    else:
        word = gl.load(at).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return word


@gluon.jit
def zero_of(word, BITS: gl.constexpr):
    """Zero points less the middle code."""
    return ((word >> 16) & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32) - (1 << (BITS - 1))


@gluon.jit
def _zeros_twice(word, BITS: gl.constexpr):
    """Zero points less the middle code, as fp16 and twice in a word."""
    half = zero_of(word, BITS).to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return half | (half << 16)


@gluon.jit
def scale_of(word):
    """Scales."""
    return (word & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def score_partition(
    found, full, empty, ring, first_half, second_half,
    latents, scales, table, starts, slow_weights, fast_weights, scores, mask,
    first, last, length, blocks, rank, latents_t, scales_t, table_t, row_mask, mask_t, block_step, members,
    at_scores, stored,
    KV: gl.constexpr, PLACES: gl.constexpr, SPAN: gl.constexpr, RANK: gl.constexpr, STAGES: gl.constexpr,
    BITS: gl.constexpr, ASYMMETRIC: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Hands scores [tile, KV] of the tiles first .. last on, tile after tile, in two buffers by turns.

    latents, scales, table, starts, slow_weights, fast_weights, scores: from where the row and block of heads begin.
    found: shared memory [2, TILE, 8]; members: heads that there are. `scores` has those of blocks with gaps.
    """
    PER_BLOCK: gl.constexpr = SPAN // TILE
    HALF: gl.constexpr = KV * PLACES // 2
    SLOW: gl.constexpr = KV * 8
    PACKED: gl.constexpr = BITS < 16
    copied: gl.constexpr = copied_layout(RANK)
    block = first // PER_BLOCK
    async_copy.async_copy_global_to_shared(first_half, _columns_at(fast_weights, HALF, RANK))
    place = gl.arange(0, HALF, gl.SliceLayout(1, copied))
    at_fast = _columns_at(fast_weights + HALF * RANK, HALF, RANK)
    async_copy.async_copy_global_to_shared(second_half, at_fast, mask=(place < HALF - SLOW)[:, None])
    slow_half = second_half.slice(HALF - SLOW, SLOW)
    at_slow = _columns_at(slow_weights, SLOW, RANK)
    words_of: gl.constexpr = gl.SliceLayout(1, words_layout(RANK * BITS // 32))
    rows: gl.constexpr = gl.SliceLayout(1, rows_layout(PLACES // 2))
    words = 0
    later_words = 0
    pairs = 0
    scale = 0
    if PACKED:
        async_copy.commit_group()
        words = load_words(latents, first * TILE, latents_t, length, 0, rank, TILE, RANK, BITS)
        later_words = load_words(latents, (first + 1) * TILE, latents_t, length, 0, rank, TILE, RANK, BITS)
        pairs = _scale_words(scales, first * TILE, scales_t, length, words_of, ASYMMETRIC)
        scale = _scale_words(scales, first * TILE, scales_t, length, rows, ASYMMETRIC)
        ring.index(0).store(unpacked(words, _zeros_twice(pairs, BITS), BITS, ASYMMETRIC))
        pairs = _scale_words(scales, (first + 1) * TILE, scales_t, length, words_of, ASYMMETRIC)
        words = later_words
    else:
        for ahead in gl.static_range(STAGES - 1):
            copy_rows(ring.index(ahead), latents, (first + ahead) * TILE, latents_t, length, 0, rank, TILE, RANK)
            async_copy.commit_group()
    start = gl.load(starts + block)
    numbers = _load_table(table, first, table_t, length, 0, PLACES)
    more_numbers = _load_table(table, first, table_t, length, 1, PLACES)
    columns = gl.load(at_slow + gl.cast(block, gl.int64) * block_step)
    async_copy.wait_group(0 if PACKED else STAGES - 2)
    slow_half.store(columns)
    fence_async_shared()
    synchronize()

    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HALF, 16])
    product = gl.zeros([TILE, HALF], gl.float32, result)
    second_product = gl.zeros([TILE, HALF], gl.float32, result)
    product = warpgroup_mma(ring.index(0), first_half.permute((1, 0)), product, use_acc=False, is_async=True)
    product = warpgroup_mma_wait(0, deps=[product])
    for tile in range(first, last):
        index = tile - first
        now, then = tile // PER_BLOCK, gl.minimum((tile + 1) // PER_BLOCK, blocks - 1)
        second_product = warpgroup_mma(
            ring.index(index % STAGES), second_half.permute((1, 0)), second_product, use_acc=False, is_async=True
        )
        changes = then > now
        next_start = gl.load(starts + then)
        columns = gl.load(
            at_slow + gl.cast(then, gl.int64) * block_step, mask=gl.full([SLOW, RANK], 1, gl.int1, copied) & changes
        )
        next_numbers = _load_table(table, tile + 1, table_t, length, 0, PLACES)
        next_more = _load_table(table, tile + 1, table_t, length, 1, PLACES)
        total = _weighed(product, numbers, KV, PLACES)
        product, total = warpgroup_mma_wait(1, deps=[product, total])
        if PACKED:
            ring.index((index + 1) % STAGES).store(unpacked(words, _zeros_twice(pairs, BITS), BITS, ASYMMETRIC))
            words = load_words(latents, (tile + 2) * TILE, latents_t, length, 0, rank, TILE, RANK, BITS)
            pairs = _scale_words(scales, (tile + 2) * TILE, scales_t, length, words_of, ASYMMETRIC)
            fence_async_shared()
            synchronize()
        else:
            # The next tile is in shared memory now, and nothing reads the last one any more.
            async_copy.wait_group(STAGES - 3)
            fence_async_shared()
        product = warpgroup_mma(
            ring.index((index + 1) % STAGES), first_half.permute((1, 0)), product, use_acc=False, is_async=True
        )
        if not PACKED:
            copy_rows(
                ring.index((index + STAGES - 1) % STAGES), latents, (tile + STAGES - 1) * TILE, latents_t, length, 0,
                rank, TILE, RANK,
            )  # fmt: skip
            async_copy.commit_group()
        second_product = warpgroup_mma_wait(1, deps=[second_product])
        total += _weighed(second_product, more_numbers, KV, PLACES)
        score = gl.sum(total, 2)
        token = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, score.type.layout))
        member = gl.arange(0, KV, gl.SliceLayout(0, score.type.layout))
        if PACKED:
            score *= gl.convert_layout(scale_of(scale), token.type.layout, assert_trivial=True)[:, None]
            scale = _scale_words(scales, (tile + 1) * TILE, scales_t, length, rows, ASYMMETRIC)
        if start == GAPS:
            at = (at_scores + member[None, :]).to(gl.int64) * stored + token[:, None]
            score = gl.load(scores + at, mask=(token < length)[:, None] & (member < members)[None, :], other=0.0)
        score = _masked(score, mask, row_mask, mask_t, token, gl.where(start == HIDDEN, 0, length), MASK)
        if changes:
            synchronize()
            slow_half.store(columns)
            fence_async_shared()
        mbarrier.wait(empty.index(index % 2), ((index // 2) & 1) ^ 1)
        found.index(index % 2).slice(0, KV, dim=1).store(score)
        synchronize()
        mbarrier.arrive(full.index(index % 2), count=1)
        product, second_product, score = warpgroup_mma_wait(0, deps=[product, second_product, score])
        start, numbers, more_numbers = next_start, next_numbers, next_more
