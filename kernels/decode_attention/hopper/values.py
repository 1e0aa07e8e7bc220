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

from palu.kernels.decode_attention.hopper.common import TILE, WARPS, copy_rows, load_words, synchronize, unpacked
from palu.kernels.decode_attention.hopper.common import words_layout
from palu.kernels.decode_attention.hopper.scores import scale_of, zero_of

LOWEST: gl.constexpr = gl.constexpr(-1e30)
# Weights are 2 ** HEADROOM where they are relative to the largest score so far, and never more than 2 ** MOST.
HEADROOM: gl.constexpr = gl.constexpr(8.0)
MOST: gl.constexpr = gl.constexpr(15.0)
# Latents of a product, and tokens.
CHUNK: gl.constexpr = gl.constexpr(128)
STEP: gl.constexpr = gl.constexpr(32)


@gluon.constexpr_function
def weights_layout(slots):
    """Weights [slots, STEP], whole in each warp: a lane has eight neighbouring tokens of some heads."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[8 << bit, 0] for bit in range((slots // 8).bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [slots, STEP.value])


@gluon.jit
def _rescaled(sums, factor, CHUNKS: gl.constexpr):
    """Sums [CHUNK, slots] times factors [slots]."""
    result = ()
    for chunk in gl.static_range(CHUNKS):
        by_column = gl.convert_layout(factor, gl.SliceLayout(0, sums[chunk].type.layout))
        result = result + (sums[chunk] * by_column[None, :],)
    return result


@gluon.jit
def _step_scales(scales, first, scales_t, length, layout: gl.constexpr, ASYMMETRIC: gl.constexpr):
    """Scales and zero points of a step's tokens, each pair as one word."""
    token = gl.minimum(first + gl.arange(0, STEP, layout), length - 1)
    at = scales + token * scales_t
    if ASYMMETRIC:
        word = gl.load(at.to(gl.pointer_type(gl.int32), bitcast=True))
    else:
        word = gl.load(at).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return word


@gluon.jit
def _place_of(row, BITS: gl.constexpr):
    """The latent that stands in a row of a chunk's sums, which codes leave in the order of `latent_order`."""
    if BITS < 16:
        PER_WORD: gl.constexpr = 32 // BITS
        WORDS: gl.constexpr = CHUNK // PER_WORD
        pair = row // 2
        row = pair % WORDS * PER_WORD + pair // WORDS + row % 2 * (PER_WORD // 2)
    return row


@gluon.jit
def value_partition(
    found, full, empty, rings, weights,
    latents, scales, sums, totals, peaks,
    first, last, length, rank, latents_t, scales_t, members, out,
    KV: gl.constexpr, SLOTS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, RANK_STRIDE: gl.constexpr,
    BITS: gl.constexpr, ASYMMETRIC: gl.constexpr,
):  # fmt: skip
    """Sums of the value latents of the tiles first .. last, weighed with the scores' exponentials.

    rings: shared memory [STAGES, STEP, CHUNK] of every chunk; weights: [2, SLOTS, STEP]; out: the block's first head in the
    part's totals and peaks.
    """
    STEPS: gl.constexpr = TILE // STEP
    PACKED: gl.constexpr = BITS < 16
    dtype: gl.constexpr = weights.dtype
    layout: gl.constexpr = weights_layout(SLOTS)
    slot = gl.arange(0, SLOTS, gl.SliceLayout(1, layout))
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SLOTS, 16])
    words_of: gl.constexpr = gl.SliceLayout(1, words_layout(CHUNK * BITS // 32))
    steps_of: gl.constexpr = gl.SliceLayout(0, layout)
    reference = gl.full([SLOTS], LOWEST, gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([SLOTS, STEP], gl.float32, layout)
    shift = gl.zeros([SLOTS, STEP], gl.float32, layout)
    summed = ()
    for chunk in gl.static_range(CHUNKS):
        summed = summed + (gl.zeros([CHUNK, SLOTS], gl.float32, result),)
    begin = first * TILE
    held, pairs, scale = (), (), ()
    if PACKED:
        for step in gl.static_range(STEPS):
            at = begin + step * STEP
            for chunk in gl.static_range(CHUNKS):
                held = held + (load_words(latents, at, latents_t, length, chunk * CHUNK, rank, STEP, CHUNK, BITS),)
            pairs = pairs + (_step_scales(scales, at, scales_t, length, words_of, ASYMMETRIC),)
            scale = scale + (_step_scales(scales, at, scales_t, length, steps_of, ASYMMETRIC),)
    else:
        for ahead in gl.static_range(STAGES - 1):
            for chunk in gl.static_range(CHUNKS):
                copy_rows(
                    rings[chunk].index(ahead), latents, begin + ahead * STEP, latents_t, length, chunk * CHUNK,
                    rank, STEP, CHUNK,
                )  # fmt: skip
            async_copy.commit_group()
    for tile in range(first, last):
        index = tile - first
        mbarrier.wait(full.index(index % 2), (index // 2) & 1)
        next_held, next_pairs, next_scale = (), (), ()
        for step in gl.static_range(STEPS):
            buffer = found.index(index % 2).slice(step * STEP, STEP, dim=0).permute((1, 0))
            score = gl.where((slot < members)[:, None], buffer.load(layout), float("-inf"))
            peak = gl.max(score, 1)
            factor = gl.full([SLOTS], 1.0, gl.float32, gl.SliceLayout(1, layout))
            if PACKED:
                of_token = scale_of(scale[step])
                peak = gl.max(score + gl.log2(of_token)[None, :], 1)
            if gl.max(peak - reference, 0) > MOST:
                higher = gl.where(peak - reference > MOST, peak - HEADROOM, reference)
                factor = gl.exp2(reference - higher)
                summed = _rescaled(summed, factor, CHUNKS)
                total *= factor[:, None]
                shift *= factor[:, None]
                reference = higher
            weight = gl.exp2(score - reference[:, None])
            total += weight
            if PACKED:
                weight *= of_token[None, :]
            rounded = weight.to(dtype)
            if ASYMMETRIC:
                shift += rounded.to(gl.float32) * zero_of(scale[step], BITS)[None, :]
            weights.index(step % 2).store(rounded)
            here = index * STEPS + step
            if PACKED:
                for chunk in gl.static_range(CHUNKS):
                    rings[chunk].index(step % 2).store(
                        unpacked(held[step * CHUNKS + chunk], pairs[step], BITS, False)
                    )
                    more = load_words(
                        latents, begin + (here + STEPS) * STEP, latents_t, length, chunk * CHUNK, rank, STEP, CHUNK,
                        BITS,
                    )  # fmt: skip
                    next_held = next_held + (more,)
                ahead = begin + (here + STEPS) * STEP
                next_pairs = next_pairs + (_step_scales(scales, ahead, scales_t, length, words_of, ASYMMETRIC),)
                next_scale = next_scale + (_step_scales(scales, ahead, scales_t, length, steps_of, ASYMMETRIC),)
            else:
                async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            synchronize()
            stage = step % 2 if PACKED else here % STAGES
            started = ()
            for chunk in gl.static_range(CHUNKS):
                latents_here = rings[chunk].index(stage).permute((1, 0))
                started = started + (
                    warpgroup_mma(latents_here, weights.index(step % 2).permute((1, 0)), summed[chunk], is_async=True),
                )
            if not PACKED:
                for chunk in gl.static_range(CHUNKS):
                    copy_rows(
                        rings[chunk].index((here + STAGES - 1) % STAGES), latents,
                        begin + (here + STAGES - 1) * STEP, latents_t, length, chunk * CHUNK, rank, STEP, CHUNK,
                    )  # fmt: skip
                async_copy.commit_group()
            summed = ()
            for chunk in gl.static_range(CHUNKS):
                summed = summed + (warpgroup_mma_wait(0, deps=[started[chunk]]),)
            if step == STEPS - 1:
                mbarrier.arrive(empty.index(index % 2), count=1)
        held, pairs, scale = next_held, next_pairs, next_scale
    there = slot < members
    gl.store(totals + out + slot, gl.sum(total, 1), mask=there)
    gl.store(peaks + out + slot, reference, mask=there)
    shifted = gl.sum(shift, 1)
    for chunk in gl.static_range(CHUNKS):
        row = gl.arange(0, CHUNK, gl.SliceLayout(1, result))
        latent = chunk * CHUNK + _place_of(row, BITS)
        column = gl.arange(0, SLOTS, gl.SliceLayout(0, result))
        value = summed[chunk]
        if ASYMMETRIC:
            value -= gl.convert_layout(shifted, gl.SliceLayout(0, result))[None, :]
        at = (out + column).to(gl.int64)[None, :] * RANK_STRIDE + latent[:, None]
        gl.store(sums + at, value, mask=(latent < rank)[:, None] & (column < members)[None, :])
