"""The half of the kernel that weighs the values, with the softmax's weights made as the scores come."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from palu.kernels.decode_attention.hopper.common import TILE, WARPS, bits_of, copy_rows, synchronize
from palu.kernels.decode_attention.kernel import LOWEST

# Weights are 2 ** HEADROOM where they are relative to the largest score so far, and never more than 2 ** MOST.
HEADROOM: gl.constexpr = gl.constexpr(8.0)
MOST: gl.constexpr = gl.constexpr(15.0)
# Latents of a product.
CHUNK: gl.constexpr = gl.constexpr(128)


@gluon.constexpr_function
def weights_layout(slots: int, tokens: int) -> gl.DistributedLinearLayout:
    """Weights [slots, tokens], whole in each warp: a lane has eight neighbouring tokens of some slots."""
    across = tokens // 8
    lanes = [[0, 8 << bit] for bit in range(bits_of(across))]
    lanes += [[1 << bit if 1 << bit < slots else 0, 0] for bit in range(5 - len(lanes))]
    held = [[(32 // across) << bit, 0] for bit in range(bits_of(max(1, slots * across // 32)))]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], *held], lanes, [[0, 0], [0, 0]], [], [slots, tokens])


@gluon.jit
def _rescaled(sums, factor):
    """Sums [CHUNK, slots] times factors [slots]."""
    result = ()
    for chunk in gl.static_range(len(sums)):
        by_column = gl.convert_layout(factor, gl.SliceLayout(0, sums[chunk].type.layout))
        result = result + (sums[chunk] * by_column[None, :],)
    return result


@gluon.jit
def _there(sums):
    """Sums of which all products are done."""
    result = ()
    for chunk in gl.static_range(len(sums)):
        result = result + (warpgroup_mma_wait(0, deps=[sums[chunk]]),)
    return result


@gluon.jit
def _head_of(
    slot, KV: gl.constexpr, QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """Which of the group's query heads has a slot, and whether any has: COLUMNS slots have TOGETHER kv heads."""
    inside = slot % COLUMNS
    kv_head, query = slot // COLUMNS * TOGETHER + inside // QUERY_SLOTS, inside % QUERY_SLOTS
    return kv_head * QUERIES + query, (inside // QUERY_SLOTS < TOGETHER) & (kv_head < KV) & (query < QUERIES)


@gluon.jit
def _copy_step(rings, stage, latents, first, step, begin, end, number, latents_t, length, rank):
    """Start copying step `number` of the tiles begin .. end; nothing is read behind them."""
    ROWS: gl.constexpr = rings[0].shape[1]
    STEPS: gl.constexpr = TILE // ROWS
    index = begin + number // STEPS
    token = (first + index * step) * TILE + number % STEPS * ROWS
    until = gl.where(index < end, length, 0)
    for chunk in gl.static_range(len(rings)):
        copy_rows(rings[chunk].index(stage), latents, token, latents_t, until, chunk * CHUNK, rank, ROWS, CHUNK)
    async_copy.commit_group()


@gluon.jit
def _softmax(found, weights, there, reference, total, summed):
    """Stores the weights of a tile's scores [tile, slots], relative to references [slots].

    References rise where scores are far above them; returns them, the weights added up, and the sums of values, both
    relative to the new ones.
    """
    STEPS: gl.constexpr = weights.shape[0]
    STEP: gl.constexpr = weights.shape[2]
    layout: gl.constexpr = weights_layout(weights.shape[1], STEP)
    scores = ()
    for part in gl.static_range(STEPS):
        score = gl.where(
            there[:, None], found.slice(part * STEP, STEP, dim=0).permute((1, 0)).load(layout), float("-inf")
        )
        scores = scores + (score,)
    highest = scores[0]
    for part in gl.static_range(1, STEPS):
        highest = gl.maximum(highest, scores[part])
    peak = gl.max(highest, 1)
    if gl.max(peak - reference, 0) > MOST:
        higher = gl.where(peak - reference > MOST, peak - HEADROOM, reference)
        factor = gl.exp2(reference - higher)
        summed = _rescaled(summed, factor)
        total *= factor[:, None]
        reference = higher
    for part in gl.static_range(STEPS):
        weight = gl.exp2(scores[part] - reference[:, None])
        total += weight
        weights.index(part).store(weight.to(weights.dtype))
    return reference, total, summed


@gluon.jit
def weigh_values(
    found, full, empty, rings, weights, latents, sums, totals, peaks,
    first, step, begin, end, length, rank, latents_t, out,
    KV: gl.constexpr, QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, RANK_STRIDE: gl.constexpr,
):  # fmt: skip
    """Sums of the value latents of the tiles first + index * step, weighed with the scores' exponentials.

    rings: shared memory [STAGES, tokens of a step, CHUNK] of every chunk; weights: [steps, slots, tokens of a step];
    out: the group's first head in the part's totals and peaks.
    """
    STEPS: gl.constexpr = weights.shape[0]
    SLOTS: gl.constexpr = weights.shape[1]
    STEP: gl.constexpr = weights.shape[2]
    CHUNKS: gl.constexpr = len(rings)
    layout: gl.constexpr = weights_layout(SLOTS, STEP)
    slot = gl.arange(0, SLOTS, gl.SliceLayout(1, layout))
    head, there = _head_of(slot, KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS)
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SLOTS, 16])
    reference = gl.full([SLOTS], LOWEST, gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([SLOTS, STEP], gl.float32, layout)
    summed = ()
    for _chunk in gl.static_range(CHUNKS):
        summed = summed + (gl.zeros([CHUNK, SLOTS], gl.float32, result),)
    for stage in gl.static_range(STAGES - 1):
        _copy_step(rings, stage, latents, first, step, begin, end, stage, latents_t, length, rank)
    for index in range(begin, end):
        done = index - begin
        mbarrier.wait(full.index(done % 2), (done // 2) & 1)
        # Products of the last tile are done in all warps, and its weights may be written over.
        synchronize()
        reference, total, summed = _softmax(found.index(done % 2), weights, there, reference, total, summed)
        for part in gl.static_range(STEPS):
            number = done * STEPS + part
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            if part > 0:
                summed = _there(summed)
            synchronize()
            if part == 0:
                # All have read the scores.
                mbarrier.arrive(empty.index(done % 2), count=1)
            started = ()
            for chunk in gl.static_range(CHUNKS):
                here = rings[chunk].index(number % STAGES).permute((1, 0))
                product = warpgroup_mma(here, weights.index(part).permute((1, 0)), summed[chunk], is_async=True)
                started = started + (product,)
            summed = started
            ahead = number + STAGES - 1
            _copy_step(rings, ahead % STAGES, latents, first, step, begin, end, ahead, latents_t, length, rank)
        summed = _there(summed)
    async_copy.wait_group(0)
    gl.store(totals + out + head, gl.sum(total, 1), mask=there)
    gl.store(peaks + out + head, reference, mask=there)
    column = gl.arange(0, SLOTS, gl.SliceLayout(0, result))
    head, there = _head_of(column, KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS)
    at_head = sums + (out + head).to(gl.int64) * RANK_STRIDE
    for chunk in gl.static_range(CHUNKS):
        latent = chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, result))
        gl.store(at_head[None, :] + latent[:, None], summed[chunk], mask=(latent < rank)[:, None] & there[None, :])
