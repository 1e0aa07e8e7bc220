"""Weights of a step's values, made of scores as they come, relative to references that rise where they have to."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from palu.kernels.decode_attention.hopper.common import (
    TILE,
    WARPS,
    bits_of,
    buffer_in,
    exp2,
    log2,
    phase_of,
    reciprocal,
)
from palu.kernels.decode_attention.hopper.operands import kv_head_of
from palu.kernels.decode_attention.kernel import LOWEST

# Weights are 2 ** HEADROOM where they are relative to the largest score so far, and never more than 2 ** MOST.
HEADROOM: gl.constexpr = gl.constexpr(8.0)
MOST: gl.constexpr = gl.constexpr(15.0)


@gluon.constexpr_function
def _neighbours(slots: int, tokens: int) -> int:
    """Neighbouring tokens' weights that a thread has."""
    return min(8, max(1, slots // WARPS.value * tokens // 32))


@gluon.constexpr_function
def weights_layout(slots: int, tokens: int) -> gl.DistributedLinearLayout:
    """Weights [slots, tokens]: a warp has a quarter of the slots, a lane up to eight neighbouring tokens of some."""
    own = slots // WARPS.value
    each = _neighbours(slots, tokens)
    lanes = [[0, each << bit] for bit in range(bits_of(tokens // each))][:5]
    held = [[0, 1 << bit] for bit in range(bits_of(each))]
    inside = [[1 << bit, 0] for bit in range(bits_of(own))]
    # Slots of a warp to the lanes that are left, then to a lane's registers; lanes without any have the same again.
    left = 5 - len(lanes)
    lanes += (inside[:left] + [[0, 0]] * left)[:left]
    warps = [[own << bit, 0] for bit in range(bits_of(WARPS.value))]
    return gl.DistributedLinearLayout([*held, *inside[left:]], lanes, warps, [], [slots, tokens])


@gluon.constexpr_function
def _everywhere(slots: int) -> gl.DistributedLinearLayout:
    """Numbers [slots], all of them in every thread."""
    return gl.DistributedLinearLayout(
        [[1 << bit] for bit in range(bits_of(slots))], [[0]] * 5, [[0]] * bits_of(WARPS.value), [], [slots]
    )


@gluon.jit
def _of_all_slots(numbers, SLOTS: gl.constexpr):
    """Numbers [slots in use] with ones for the slots behind."""
    USED: gl.constexpr = numbers.shape[0]
    everywhere: gl.constexpr = _everywhere(USED)
    numbers = gl.convert_layout(numbers, everywhere)
    if USED < SLOTS:
        both = gl.join(numbers, gl.full_like(numbers, 1.0))
        numbers = both.permute([1, 0]).reshape([SLOTS])
    return numbers


@gluon.jit
def _rescaled(sums, factor):
    """Sums [CHUNK, slots] times factors [slots in use]."""
    factor = _of_all_slots(factor, sums[0].shape[1])
    result = ()
    for chunk in gl.static_range(len(sums)):
        by_column = gl.convert_layout(factor, gl.SliceLayout(0, sums[chunk].type.layout))
        result = result + (sums[chunk] * by_column[None, :],)
    return result


@gluon.jit
def head_of(
    slot, KV: gl.constexpr, QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """Which of the group's query heads has a slot, and whether any has."""
    kv_head, query = kv_head_of(slot, QUERY_SLOTS, TOGETHER, COLUMNS)
    return kv_head * QUERIES + query, (kv_head < KV) & (query < QUERIES)


@gluon.jit
def _scores_of(found, first, STEP: gl.constexpr, USED: gl.constexpr):
    """Scores of a step's tokens in the slots in use, shared memory [slots, tokens]."""
    scores = found.slice(first, STEP, dim=0)
    if found.shape[1] > USED:
        scores = scores.slice(0, USED, dim=1)
    return scores.permute((1, 0))


@gluon.jit
def _stored(weights, rounded):
    """Store a step's weights [slots in use, tokens], zero in the other slots."""
    SLOTS: gl.constexpr = weights.shape[0]
    USED: gl.constexpr = rounded.shape[0]
    STEP: gl.constexpr = rounded.shape[1]
    if USED < SLOTS:
        both = gl.join(rounded, gl.zeros_like(rounded))
        rounded = both.permute([2, 0, 1]).reshape([SLOTS, STEP])
    weights.store(rounded)


@gluon.jit
def load_scores(
    full, found, WHICH: gl.constexpr, done, number, there, STEP: gl.constexpr, TILES: gl.constexpr,
    EITHER: gl.constexpr,
):  # fmt: skip
    """Scores [slots in use, STEP] of `number` of TILES tiles, from buffer WHICH on as in `buffer_in`, step by step.

    Waits until they are there.
    """
    phase = phase_of(done, EITHER)
    mbarrier.wait(buffer_in(full, WHICH, done, EITHER), phase)
    if number == 2:
        mbarrier.wait(buffer_in(full, 1, done, EITHER), phase)
    USED: gl.constexpr = there.shape[0]
    scores = ()
    for tile in gl.static_range(TILES):
        for step in gl.static_range(TILE // STEP):
            place = buffer_in(found, WHICH + tile, done, EITHER)
            score = _scores_of(place, step * STEP, STEP, USED).load(weights_layout(USED, STEP))
            # There is a first tile.
            visible = there & (tile < number) if tile > 0 else there
            scores = scores + (gl.where(visible[:, None], score, float("-inf")),)
    return scores


@gluon.jit
def hand_back(empty, WHICH: gl.constexpr, done, TILES: gl.constexpr, EITHER: gl.constexpr):
    """The buffers of `load_scores` may be written over: all warps have read them."""
    # Those of two groups have one barrier.
    for tile in gl.static_range(TILES if len(empty) == 1 else 1):
        mbarrier.arrive(buffer_in(empty, WHICH + tile, done, EITHER), count=1)


@gluon.jit
def parameters_of(scales, place, part: gl.constexpr, STEP: gl.constexpr, layout: gl.constexpr):
    """One over the scales, and the shifts, of step `part` of tiles' values; place: `place_of_scales`."""
    STEPS: gl.constexpr = TILE // STEP
    at = place + part // STEPS
    inverse = scales[0].index(at).slice(part % STEPS * STEP, STEP).load(layout)
    return inverse, scales[1].index(at).slice(part % STEPS * STEP, STEP).load(layout)


@gluon.jit
def highest(scores):
    """The larger score of every slot and token, of all steps."""
    result = scores[0]
    for part in gl.static_range(1, len(scores)):
        result = gl.maximum(result, scores[part])
    return result


@gluon.jit
def store_excess(excess, scores, reference):
    """Whether some of a warp's scores are far above their references, to shared memory [warps]."""
    USED: gl.constexpr = scores[0].shape[0]
    STEP: gl.constexpr = scores[0].shape[1]
    EACH: gl.constexpr = _neighbours(USED, STEP)
    # Each thread's largest first.
    most = gl.max(highest(scores).reshape([USED, STEP // EACH, EACH]), 2)
    reference = gl.convert_layout(reference, gl.SliceLayout(1, most.type.layout), assert_trivial=True)
    above = (most - reference[:, None] > MOST).to(gl.int32)
    # One instruction finds the largest integer of a warp.
    excess.store(gl.max(above.reshape([WARPS, above.shape[0] // WARPS * above.shape[1]]), 1))


@gluon.jit
def softmax(
    scores, excess, scales, place, weights, reference, total, shifted, summed, BITS: gl.constexpr
):  # fmt: skip
    """Stores the weights of tiles' scores, relative to references [slots in use].

    References rise where scores are far above them, by `excess`; returns them, the weights added up, as they are and
    times the codes' shifts, and the sums of values, all relative to the new ones. Of codes, scores have the logarithm
    of the values' scales added, so the weights are times the scales.
    """
    STEP: gl.constexpr = weights[0].shape[1]
    USED: gl.constexpr = reference.shape[0]
    of_tokens: gl.constexpr = gl.SliceLayout(0, weights_layout(USED, STEP))
    if gl.max(excess.load(_everywhere(WARPS.value)), 0) > 0:
        peak = gl.max(highest(scores), 1)
        higher = gl.where(peak - reference > MOST, peak - HEADROOM, reference)
        factor = exp2(reference - higher)
        summed = _rescaled(summed, factor)
        total *= factor[:, None]
        if BITS < 16:
            shifted *= factor[:, None]
        reference = higher
    for part in gl.static_range(len(scores)):
        weight = exp2(scores[part] - reference[:, None])
        rounded = weight.to(weights[0].dtype)
        _stored(weights[part], rounded)
        if BITS < 16:
            inverse, shift = parameters_of(scales, place, part, STEP, of_tokens)
            total += weight * inverse[None, :]
            shifted += rounded.to(gl.float32) * shift[None, :]
        else:
            total += weight
    return reference, total, shifted, summed


@gluon.jit
def logarithm_and_scale(reference, total):
    """Base-2 logarithms of sums of weights that are relative to references, and one over the sums.

    Where nothing is seen the lowest number, and a finite one.
    """
    return gl.where(total > 0, reference + log2(total), LOWEST), reciprocal(gl.maximum(total, 1e-30))
