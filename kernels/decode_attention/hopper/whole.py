"""Values of codes, weighed by products of whole numbers, which the matrix units add up exactly.

A tile's weights are taken relative to its own largest score, as numbers of 15 bits: two signed bytes, in neighbouring
columns of a product with the codes, which are bytes without more than a mask. Sums of tiles are added up in float32.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from palu.kernels.decode_attention.hopper.common import WARPS, exp2, synchronize
from palu.kernels.decode_attention.hopper.fields import planes_of
from palu.kernels.decode_attention.hopper.operands import CHUNK, bytes_operand, side_by_side, value_units
from palu.kernels.decode_attention.hopper.parameters import place_of_scales
from palu.kernels.decode_attention.hopper.softmax import (
    hand_back,
    head_of,
    highest,
    load_scores,
    logarithm_and_scale,
    parameters_of,
    weights_layout,
)
from palu.kernels.decode_attention.hopper.values import copy_step, latents_layout, store_means
from palu.kernels.decode_attention.kernel import LOWEST

# The largest weight of a tile: its upper byte is 127.
LARGEST: gl.constexpr = gl.constexpr(127.0 * 256.0)


@gluon.constexpr_function
def _product(used: int) -> gl.NVMMADistributedLayout:
    """Products of codes and both bytes of the weights of so many slots."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS.value, 1], [16, 2 * used, 32])


@gluon.jit
def whole_of(product):
    """Sums of both bytes' columns [rows, 2 * slots] as float32 [rows, slots]."""
    upper, lower = gl.split(product.reshape([product.shape[0], product.shape[1] // 2, 2]))
    return ((upper << 8) + lower).to(gl.float32)


@gluon.jit
def _ordered(bits):
    """Bits of numbers to integers that are larger where these are, or back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@gluon.jit
def _largest(scores):
    """The largest score of every slot; one instruction finds the largest integer of a warp."""
    most = _ordered(gl.max(_ordered(highest(scores).to(gl.int32, bitcast=True)), 1))
    return gl.maximum(most.to(gl.float32, bitcast=True), LOWEST)


@gluon.jit
def two_bytes(whole):
    """Both bytes of numbers [slots, columns], int32, as rows side by side, int8 [2 * slots, columns]."""
    upper = (whole + 128) >> 8
    both = gl.join(upper, whole - (upper << 8)).permute([0, 2, 1]).reshape([2 * whole.shape[0], whole.shape[1]])
    return both.to(gl.int8)


@gluon.jit
def _softmax(
    scores, peak, scales, place, weights, turn, reference, total, shifted
):  # fmt: skip
    """Stores weights, to the buffers whose turn it is, relative to the tiles' peaks.

    Returns the reference, the weights' sum and that times the shifts, both relative to the reference. Scores
    have the logarithm of the values' scales added, so the weights are times the scales.
    """
    USED: gl.constexpr = peak.shape[0]
    STEP: gl.constexpr = weights[0].shape[2]
    of_tokens: gl.constexpr = gl.SliceLayout(0, weights_layout(USED, STEP))
    higher = gl.maximum(reference, peak)
    before, now = exp2(reference - higher)[:, None], exp2(peak - higher)[:, None]
    total *= before
    shifted *= before
    for part in gl.static_range(len(scores)):
        weight = exp2(scores[part] - peak[:, None])
        whole = (weight * LARGEST + 0.5).to(gl.int32)
        weights[part].index(turn).store(side_by_side(two_bytes(whole)))
        inverse, shift = parameters_of(scales, place, part, STEP, of_tokens)
        total += weight * inverse[None, :] * now
        shifted += whole.to(gl.float32) * shift[None, :] * (now * (1.0 / LARGEST))
    return higher, total, shifted


@gluon.jit
def _weigh(rings, stage, weights, products, ADDED: gl.constexpr, BITS: gl.constexpr):
    """A step's codes times its weights, chunk after chunk, two of which are under way at a time.

    Bytes cannot be named where their product is waited for; `tests/compile_launches.py` looks whether their registers
    are left alone until then.
    """
    result: gl.constexpr = products[0].type.layout
    transposed = weights.permute((1, 0))
    done = ()
    operand = bytes_operand(value_units(rings, stage, 0, BITS), result, BITS)
    if len(products) > 1:
        # Asked for a product before they are needed.
        packed = value_units(rings, stage, 1, BITS)
    under_way = warpgroup_mma(operand, transposed, products[0], use_acc=ADDED, is_async=True)
    for chunk in gl.static_range(1, len(products)):
        operand = bytes_operand(packed, result, BITS)
        if chunk + 1 < len(products):
            packed = value_units(rings, stage, chunk + 1, BITS)
        begun = warpgroup_mma(operand, transposed, products[chunk], use_acc=ADDED, is_async=True)
        done = done + (warpgroup_mma_wait(1, deps=[under_way]),)
        under_way = begun
    return done + (warpgroup_mma_wait(0, deps=[under_way]),)


@gluon.jit
def _added(summed, products, before, now):
    """Sums [CHUNK, slots] times a factor, and products' sums times another."""
    result = ()
    for chunk in gl.static_range(len(summed)):
        result = result + (summed[chunk] * before[None, :] + whole_of(products[chunk]) * now[None, :],)
    return result


@gluon.jit
def weigh_whole(
    rings, weights, tops, of_slots, out, arguments, WHICH: gl.constexpr, SHARED_BY: gl.constexpr, KV: gl.constexpr,
    QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr,
    RANK_STRIDE: gl.constexpr, BITS: gl.constexpr,
):  # fmt: skip
    """As `weigh_values`, of codes; two tiles at a time, or of two groups of warps each every other tile.

    weights: int8, of each step [2, 2 * slots, tokens of a step]; tops: float32 [2, slots], the tiles' largest scores;
    of_slots: as `store_means` takes it.
    Both by turns, so that warps wait for each other once per step only, and once for scores.
    """
    found, scales, full, empty, tiles, latents, means, logarithms, rank, latents_t, units = arguments
    TILES: gl.constexpr = 2 // SHARED_BY
    PARTS: gl.constexpr = len(weights)
    STEP: gl.constexpr = weights[0].shape[2]
    USED: gl.constexpr = weights[0].shape[1] // 2
    CHUNKS: gl.constexpr = len(rings) // planes_of(BITS)
    STAGES: gl.constexpr = rings[0].shape[0]
    layout: gl.constexpr = weights_layout(USED, STEP)
    result: gl.constexpr = _product(USED)
    slot = gl.arange(0, USED, gl.SliceLayout(1, layout))
    head, there = head_of(slot, KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS)
    zeros = gl.zeros([CHUNK, 2 * USED], gl.int32, result)
    nothing = whole_of(zeros)
    by_slot: gl.constexpr = gl.SliceLayout(0, nothing.type.layout)
    reference = gl.full([USED], LOWEST, gl.float32, gl.SliceLayout(1, layout))
    reference_of_sums = gl.full([USED], LOWEST, gl.float32, by_slot)
    total = gl.zeros([USED, STEP], gl.float32, layout)
    shifted = gl.zeros([USED, STEP], gl.float32, layout)
    summed = ()
    for _chunk in gl.static_range(CHUNKS):
        summed = summed + (nothing,)
    _, _, begin, end, _ = tiles
    begin += WHICH
    for index in range(begin, end, 2):
        round = (index - begin) // 2
        number = gl.minimum(end - index, TILES)
        scores = load_scores(full, found, WHICH, round, number, there, STEP, TILES, False)
        synchronize()
        hand_back(empty, WHICH, round, TILES, False)
        peak = _largest(scores)
        tops.index(round % 2).store(peak)
        reference, total, shifted = _softmax(
            scores, peak, scales, place_of_scales(WHICH, round, False), weights, round % 2, reference, total, shifted
        )
        products = (zeros,) * CHUNKS
        for part in gl.static_range(PARTS):
            step = round * PARTS + part
            async_copy.wait_group(STAGES - 2)
            if part == 0:
                fence_async_shared()
            # The step is there, and the one before it has been read by all.
            synchronize()
            ahead = step + STAGES - 1
            copy_step(rings, ahead % STAGES, latents, tiles, begin, ahead, latents_t, units, SHARED_BY)
            products = _weigh(rings, step % STAGES, weights[part].index(round % 2), products, part > 0, BITS)
        top = tops.index(round % 2).load(by_slot)
        higher = gl.maximum(reference_of_sums, top)
        before, now = exp2(reference_of_sums - higher), exp2(top - higher) * (1.0 / LARGEST)
        summed = _added(summed, products, before, now)
        reference_of_sums = higher
    async_copy.wait_group(0)
    logarithm, scale = logarithm_and_scale(reference, gl.sum(total, 1))
    gl.store(logarithms + out + head, logarithm, mask=there)
    store_means(
        means, out, summed, of_slots, scale, gl.sum(shifted, 1) * scale, rank, latents_layout(USED, BITS, True),
        KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS, RANK_STRIDE, BITS, True,
    )  # fmt: skip
