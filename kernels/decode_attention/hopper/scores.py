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

from palu.kernels.decode_attention.hopper.common import (
    TILE,
    WARPS,
    copied_layout,
    copy_rows,
    copy_to_shared,
    load_seen,
    synchronize,
)
from palu.kernels.decode_attention.hopper.folded import fold, load_pairs, weighed
from palu.kernels.decode_attention.hopper.rotated import LEAST, load_queries, rotated, store_queries
from palu.kernels.decode_attention.hopper.turns import load_turns
from palu.kernels.latent_scores.tiles import LOG2_E


@gluon.jit
def _hand_on(found, full, empty, index, scores, seen):
    """Store a tile's scores, each [tile, columns], one after the other, with hidden ones at minus infinity.

    seen: what is added to every token's scores.
    """
    columns: gl.constexpr = scores[0].shape[1]
    mbarrier.wait(empty.index(index % 2), ((index // 2) & 1) ^ 1)
    for part in gl.static_range(len(scores)):
        score = scores[part]
        added = gl.convert_layout(seen, gl.SliceLayout(1, score.type.layout), assert_trivial=True)
        # Scores of hidden tokens may be anything.
        score = gl.where((added > float("-inf"))[:, None], score + (added * LOG2_E)[:, None], float("-inf"))
        found.index(index % 2).slice(part * columns, columns, dim=1).store(score)
    synchronize()
    mbarrier.arrive(full.index(index % 2), count=1)


@gluon.jit
def _copy_tile(to, latents, first, step, index, end, latents_t, length, rank):
    """Start copying a tile's latents; nothing is read from tile `end` on."""
    ROWS: gl.constexpr = to.shape[0]
    until = gl.where(index < end, length, 0)
    copy_rows(to, latents, (first + index * step) * TILE, latents_t, until, 0, rank, ROWS, to.shape[1])
    async_copy.commit_group()


@gluon.jit
def _copy_factors(factors, up, up_stride, rank, WIDTH: gl.constexpr):
    """Start copying kv heads' rows of the up factor, both of a pair side by side, zero where there are none."""
    KV: gl.constexpr = factors.shape[0]
    WIDE: gl.constexpr = factors.shape[1]
    RANK: gl.constexpr = factors.shape[2]
    layout: gl.constexpr = copied_layout(RANK)
    row = gl.arange(0, WIDE, gl.SliceLayout(1, layout))
    latent = gl.arange(0, RANK, gl.SliceLayout(0, layout))
    ok = (row < WIDTH)[:, None] & (latent < rank)[None, :]
    at = up + ((row // 2 + row % 2 * (WIDTH // 2)) * up_stride)[:, None] + latent[None, :]
    for head in gl.static_range(KV):
        copy_to_shared(factors.index(head), at + head * WIDTH * up_stride, mask=ok)
    async_copy.commit_group()


@gluon.jit
def _there(scores, operand):
    """Scores of which all products are done, but the last one of keys."""
    result = ()
    for part in gl.static_range(len(scores) - 1):
        result = result + (warpgroup_mma_wait(1, deps=[scores[part]]),)
    last, operand = warpgroup_mma_wait(1, deps=[scores[len(scores) - 1], operand])
    return result + (last,)


@gluon.jit
def score_rebuilt(
    found, full, empty, ring, factors, queries, latents, table, mask, up, query,
    first, step, begin, end, length, rank, latents_t, table_t, row_mask, mask_t, up_stride, query_stride, scaling,
    FOLDED: gl.constexpr, TOGETHER: gl.constexpr, QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of the tiles first + index * step, begin <= index < end, of keys that are rebuilt head after head.

    factors: shared memory [KV, WIDE, RANK], rows of every kv head, a pair's side by side; queries: [KV, LEAST, WIDE],
    in the same order, where they are not folded into the factors. While a head's products are weighed or turned, those
    of the next are under way.
    """
    KV: gl.constexpr = factors.shape[0]
    WIDE: gl.constexpr = factors.shape[1]
    AHEAD: gl.constexpr = 2 if KV > 1 else 1
    dtype: gl.constexpr = factors.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, LEAST, 16])
    rows: gl.constexpr = gl.SliceLayout(1, wide if FOLDED else narrow)
    _copy_factors(factors, up, up_stride, rank, WIDTH)
    for stage in gl.static_range(STAGES):
        _copy_tile(ring.index(stage), latents, first, step, begin + stage, end, latents_t, length, rank)
    turns = load_turns(table, (first + begin * step) * TILE, table_t, length, WIDE // 2)
    if FOLDED:
        q_first, q_second = load_pairs(query, query_stride, scaling, KV, WIDE, factors.shape[2], WIDTH)
        async_copy.wait_group(STAGES)
        synchronize()
        fold(factors, q_first, q_second)
    else:
        store_queries(queries, query, query_stride, scaling, TOGETHER, QUERIES, QUERY_SLOTS, WIDTH)
    async_copy.wait_group(STAGES - 1)
    fence_async_shared()
    synchronize()
    products, scores = (), ()
    for head in gl.static_range(AHEAD):
        zeros = gl.zeros([TILE, WIDE], gl.float32, wide)
        begun = warpgroup_mma(ring.index(0), factors.index(head).permute((1, 0)), zeros, use_acc=False, is_async=True)
        products = products + (warpgroup_mma_wait(0, deps=[begun]),)
    if not FOLDED:
        for _place in gl.static_range(0, KV, TOGETHER):
            scores = scores + (gl.zeros([TILE, LEAST], gl.float32, narrow),)
    for index in range(begin, end):
        done = index - begin
        token = (first + index * step) * TILE
        inside = token + gl.arange(0, TILE, rows)
        seen = load_seen(mask, row_mask, mask_t, inside, inside < length, MASK)
        # Zero, but the compiler must not know: it would keep the addresses of all factors in registers.
        none = index >> 30
        if FOLDED:
            next_turns = load_turns(table, token + step * TILE, table_t, length, WIDE // 2)
        handed = ()
        for head in gl.static_range(KV):
            if head == KV - AHEAD:
                async_copy.wait_group(STAGES - 2)
                fence_async_shared()
                synchronize()
            product = products[head % AHEAD]
            # Numbers of a head's own, for less than 2 ** 23 tiles: the assembler would keep them for all heads, and
            # where the same numbers meet the same registers before and after a product, it takes the second result to
            # be the first (CUDA 12.8).
            own_turns = turns ^ (index >> (30 - head))
            if FOLDED:
                score = weighed(product, own_turns, dtype)
                # Nothing that reads the product may be moved behind this point.
                product, score = warpgroup_mma_wait(AHEAD - 1, deps=[product, score])
                handed = handed + (score[:, None],)
            else:
                operand = rotated(product, own_turns, dtype)
                score = warpgroup_mma(
                    operand, queries.index(head + none).permute((1, 0)), scores[head // TOGETHER],
                    use_acc=head % TOGETHER > 0, is_async=True,
                )  # fmt: skip
                scores = scores[: head // TOGETHER] + (score,) + scores[head // TOGETHER + 1 :]
            if head == KV - 1:
                # All products of this tile's latents are done.
                synchronize()
                if not FOLDED:
                    # No sooner: before, registers hold what the second product reads.
                    next_turns = load_turns(table, token + step * TILE, table_t, length, WIDE // 2)
            ahead = warpgroup_mma(
                ring.index((done + (head + AHEAD) // KV) % STAGES),
                factors.index((head + AHEAD) % KV + none).permute((1, 0)), product, use_acc=False, is_async=True,
            )  # fmt: skip
            products = products[: head % AHEAD] + (ahead,) + products[head % AHEAD + 1 :]
            if head < KV - 1:
                if FOLDED:
                    ready = warpgroup_mma_wait(AHEAD - 1, deps=[products[(head + 1) % AHEAD]])
                else:
                    ready, operand = warpgroup_mma_wait(AHEAD - 1, deps=[products[(head + 1) % AHEAD], operand])
                products = products[: (head + 1) % AHEAD] + (ready,) + products[(head + 1) % AHEAD + 1 :]
        _copy_tile(ring.index(done % STAGES), latents, first, step, index + STAGES, end, latents_t, length, rank)
        if not FOLDED:
            scores = _there(scores, operand)
            handed = scores
        _hand_on(found, full, empty, done, handed, seen)
        # Nothing may be under way at the end of a loop's body.
        finished = ()
        for head in gl.static_range(AHEAD):
            finished = finished + (warpgroup_mma_wait(0, deps=[products[(KV + head) % AHEAD]]),)
        products = finished
        turns = next_turns
    async_copy.wait_group(0)


@gluon.jit
def score_absorbed(
    found, full, empty, ring, queries, latents, mask, query,
    first, step, begin, end, length, rank, latents_t, row_mask, mask_t, query_stride, scaling,
    QUERIES: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """As `score_rebuilt`, of queries that the up factor is multiplied into: shared memory [slots, RANK]."""
    slots: gl.constexpr = queries.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, slots, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    for stage in gl.static_range(STAGES - 1):
        _copy_tile(ring.index(stage), latents, first, step, begin + stage, end, latents_t, length, rank)
    loaded = load_queries(query, query_stride, rank, 0, slots, queries.shape[1], QUERIES, False)
    queries.store((loaded * scaling).to(queries.dtype))
    zeros = gl.zeros([TILE, slots], gl.float32, layout)
    for index in range(begin, end):
        done = index - begin
        token = (first + index * step) * TILE + gl.arange(0, TILE, rows)
        seen = load_seen(mask, row_mask, mask_t, token, token < length, MASK)
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        synchronize()
        score = warpgroup_mma(ring.index(done % STAGES), queries.permute((1, 0)), zeros, use_acc=False, is_async=True)
        ahead = index + STAGES - 1
        _copy_tile(ring.index((done + STAGES - 1) % STAGES), latents, first, step, ahead, end, latents_t, length, rank)
        score = warpgroup_mma_wait(0, deps=[score])
        _hand_on(found, full, empty, done, (score,), seen)
    async_copy.wait_group(0)
