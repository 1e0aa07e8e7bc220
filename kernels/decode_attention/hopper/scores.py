"""The half of the kernel that scores: tile after tile, handed on in two buffers by turns."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from palu.kernels.decode_attention.hopper.common import TILE, WARPS, bits_of, copy_rows, load_seen, synchronize

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
# Columns of scores that the matrix units compute at least.
LEAST: gl.constexpr = gl.constexpr(8)


@gluon.constexpr_function
def rows_layout(columns: int) -> gl.DistributedLinearLayout:
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
def _hand_on(found, full, empty, index, scores, seen, MASK: gl.constexpr):
    """Store a tile's scores [tile, columns], a buffer's columns one after the other, with hidden ones at minus infinity.

    seen: what is added to every token's scores.
    """
    columns: gl.constexpr = scores[0].shape[1]
    mbarrier.wait(empty.index(index % 2), ((index // 2) & 1) ^ 1)
    for part in gl.static_range(len(scores)):
        score = scores[part]
        added = gl.convert_layout(seen, gl.SliceLayout(1, score.type.layout), assert_trivial=True)
        score += (added * LOG2_E if MASK == "additive" else added)[:, None]
        found.index(index % 2).slice(part * columns, columns, dim=1).store(score)
    synchronize()
    mbarrier.arrive(full.index(index % 2), count=1)


@gluon.jit
def _load_turns(table, first, table_t, length, PAIRS: gl.constexpr):
    """Cosines and sines of a tile's tokens as words [tile, PAIRS], as `Rotation.lane_table` has them."""
    layout: gl.constexpr = rows_layout(PAIRS)
    # Behind the last token any numbers do.
    token = gl.minimum(first + gl.arange(0, TILE, gl.SliceLayout(1, layout)), length - 1)
    place = gl.arange(0, PAIRS, gl.SliceLayout(0, layout))
    at = table + gl.cast(token, gl.int64)[:, None] * table_t
    return gl.load(at.to(gl.pointer_type(gl.int32), bitcast=True) + place[None, :])


@gluon.constexpr_function
def _halves(dtype: gl.dtype) -> str:
    """Assembly that makes two float32 numbers of a word."""
    if dtype == gl.bfloat16:
        return "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    return "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"


@gluon.jit
def _rotated(product, turns, DTYPE: gl.constexpr):
    """Rebuilt keys [tile, WIDE], both numbers of a pair side by side, turned, as the next product wants them."""
    WIDE: gl.constexpr = product.shape[1]
    first, second = gl.split(product.reshape([TILE, WIDE // 2, 2]))
    by_pair = turns.reshape([TILE, 4, WIDE // 8]).permute([0, 2, 1]).reshape([TILE, WIDE // 2])
    by_pair = gl.convert_layout(by_pair, first.type.layout, assert_trivial=True)
    # Not pure, so that the numbers of all pairs are not kept in registers.
    cos, sin = gl.inline_asm_elementwise(
        _halves(DTYPE), "=f,=f,r", [by_pair], dtype=(gl.float32, gl.float32), is_pure=False, pack=1
    )
    turned = gl.join(first * cos - second * sin, second * cos + first * sin)
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, LEAST, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    return gl.convert_layout(turned.reshape([TILE, WIDE]).to(DTYPE), operand, assert_trivial=True)


@gluon.jit
def _waited(scores):
    """Scores of which all products are done."""
    result = ()
    for part in gl.static_range(len(scores)):
        result = result + (warpgroup_mma_wait(0, deps=[scores[part]]),)
    return result


@gluon.jit
def copy_tile(to, latents, first, step, index, end, latents_t, length, rank):
    """Start copying a tile's latents; nothing is read from tile `end` on."""
    ROWS: gl.constexpr = to.shape[0]
    until = gl.where(index < end, length, 0)
    copy_rows(to, latents, (first + index * step) * TILE, latents_t, until, 0, rank, ROWS, to.shape[1])
    async_copy.commit_group()


@gluon.jit
def score_rotated(
    found, full, empty, ring, factors, queries, latents, table, mask,
    first, step, begin, end, length, rank, latents_t, table_t, row_mask, mask_t,
    KV: gl.constexpr, TOGETHER: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of the tiles first + index * step, begin <= index < end: keys are rebuilt, turned, multiplied.

    factors: shared memory [KV, WIDE, RANK], rows of every kv head, a pair's side by side; queries: [KV, LEAST, WIDE], in
    the same order, zero but where TOGETHER kv heads that share columns have their own. found: [2, TILE, slots].
    """
    WIDE: gl.constexpr = factors.shape[1]
    RANK: gl.constexpr = factors.shape[2]
    dtype: gl.constexpr = factors.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, LEAST, 16])
    rows: gl.constexpr = gl.SliceLayout(1, narrow)
    products = ()
    for part in gl.static_range(2):
        products = products + (gl.zeros([TILE, WIDE], gl.float32, wide),)
    scores = ()
    for part in gl.static_range(KV // TOGETHER):
        scores = scores + (gl.zeros([TILE, LEAST], gl.float32, narrow),)
    seen = gl.full([TILE], 0.0, gl.float32, rows)
    for stage in gl.static_range(STAGES):
        copy_tile(ring.index(stage), latents, first, step, begin + stage, end, latents_t, length, rank)
    turns = _load_turns(table, (first + begin * step) * TILE, table_t, length, WIDE // 2)
    # What the kernel copied has come as well.
    async_copy.wait_group(STAGES - 1)
    fence_async_shared()
    product = warpgroup_mma(ring.index(0), factors.index(0).permute((1, 0)), products[0], use_acc=False, is_async=True)
    products = (warpgroup_mma_wait(0, deps=[product]), products[1])
    for index in range(begin, end):
        done = index - begin
        token = (first + index * step) * TILE
        inside = token + gl.arange(0, TILE, rows)
        next_seen = load_seen(mask, row_mask, mask_t, inside, inside < length, MASK)
        operand = ()
        # Zero, but the compiler must not know: it would keep the addresses of all factors in registers.
        none = index >> 30
        for head in gl.static_range(KV):
            if head == KV - 1:
                async_copy.wait_group(STAGES - 2)
                fence_async_shared()
            here = ring.index((done + (head + 1) // KV) % STAGES)
            ahead = warpgroup_mma(
                here, factors.index((head + 1) % KV + none).permute((1, 0)), products[(head + 1) % 2], use_acc=False,
                is_async=True,
            )  # fmt: skip
            if head == 0 and index > begin:
                _hand_on(found, full, empty, done - 1, scores, seen, MASK)
            # The last head's scores are there as well, so nothing reads its operand any more.
            current = products[head % 2]
            if head == 0:
                current = warpgroup_mma_wait(1, deps=[current])
            else:
                current, operand = warpgroup_mma_wait(1, deps=[current, operand])
            operand = _rotated(current, turns, dtype)
            if head == KV - 1:
                turns = _load_turns(table, token + step * TILE, table_t, length, WIDE // 2)
            score = warpgroup_mma(
                operand, queries.index(head + none).permute((1, 0)), scores[head // TOGETHER], use_acc=head % TOGETHER > 0,
                is_async=True,
            )  # fmt: skip
            scores = scores[: head // TOGETHER] + (score,) + scores[head // TOGETHER + 1 :]
            products = (ahead, current) if head % 2 == 1 else (current, ahead)
        # Nothing may be under way at the end of a loop's body.
        first_product, second_product, operand = warpgroup_mma_wait(0, deps=[products[0], products[1], operand])
        scores = _waited(scores)
        products = (first_product, second_product) if KV % 2 == 0 else (second_product, first_product)
        copy_tile(ring.index(done % STAGES), latents, first, step, index + STAGES, end, latents_t, length, rank)
        seen = next_seen
    if end > begin:
        _hand_on(found, full, empty, end - begin - 1, scores, seen, MASK)


@gluon.jit
def score_absorbed(
    found, full, empty, ring, queries, latents, mask,
    first, step, begin, end, length, rank, latents_t, row_mask, mask_t,
    STAGES: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """As `score_rotated`, of queries that the up factor is multiplied into: shared memory [slots, RANK]."""
    slots: gl.constexpr = queries.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, slots, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    for stage in gl.static_range(STAGES - 1):
        copy_tile(ring.index(stage), latents, first, step, begin + stage, end, latents_t, length, rank)
    zeros = gl.zeros([TILE, slots], gl.float32, layout)
    for index in range(begin, end):
        done = index - begin
        token = (first + index * step) * TILE + gl.arange(0, TILE, rows)
        seen = load_seen(mask, row_mask, mask_t, token, token < length, MASK)
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        score = warpgroup_mma(ring.index(done % STAGES), queries.permute((1, 0)), zeros, use_acc=False, is_async=True)
        ahead = index + STAGES - 1
        copy_tile(ring.index((done + STAGES - 1) % STAGES), latents, first, step, ahead, end, latents_t, length, rank)
        score = warpgroup_mma_wait(0, deps=[score])
        _hand_on(found, full, empty, done, (score,), seen, MASK)
