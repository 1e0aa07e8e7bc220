"""The warps that score where keys are absorbed: latents meet the queries that the up factor is multiplied into."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from palu.kernels.decode_attention.hopper.common import (
    TILE,
    WARPS,
    allow_launch_after,
    buffer_in,
    load_seen,
    phase_of,
    synchronize,
)
from palu.kernels.decode_attention.hopper.operands import key_bytes, latent_of_byte, taken_away
from palu.kernels.decode_attention.hopper.parameters import (
    hand_on_parameters,
    load_parameters,
    logarithm_of,
    place_of_scales,
    scale_of,
    zero_of,
)
from palu.kernels.decode_attention.hopper.products import hand_on
from palu.kernels.decode_attention.hopper.tiles import copy_tile, loaded_of, operand_of
from palu.kernels.decode_attention.hopper.whole import LARGEST, two_bytes, whole_of


@gluon.jit
def store_whole_queries(
    queries, units, query, head_step, width, scaling, QUERIES: gl.constexpr, BITS: gl.constexpr
):  # fmt: skip
    """Queries as whole numbers of 15 bits, both bytes as rows side by side, latents as the codes' operand has them.

    queries: int8 [2 * slots, RANK]; units: float32 [2, slots], what the numbers stand for, and the queries' sums.
    """
    SLOTS: gl.constexpr = queries.shape[0] // 2
    RANK: gl.constexpr = queries.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    slot = gl.arange(0, SLOTS, gl.SliceLayout(1, layout))
    latent = latent_of_byte(gl.arange(0, RANK, gl.SliceLayout(0, layout)), BITS)
    ok = (slot < QUERIES)[:, None] & (latent < width)[None, :]
    numbers = gl.load(query + (slot * head_step)[:, None] + latent[None, :], mask=ok, other=0.0).to(gl.float32)
    numbers *= scaling
    # Of a query of zeros any unit does.
    unit = gl.maximum(gl.max(gl.abs(numbers), 1), 1e-30) * (1.0 / LARGEST)
    whole = gl.floor(numbers / unit[:, None] + 0.5).to(gl.int32)
    queries.store(two_bytes(whole))
    units.index(0).store(unit)
    units.index(1).store(gl.sum(whole, 1).to(gl.float32) * unit)


@gluon.jit
def score_absorbed_codes(
    found, scales, full, empty, ring, queries, units, arguments, WHICH: gl.constexpr, SHARED_BY: gl.constexpr,
    BITS: gl.constexpr, VALUE_BITS: gl.constexpr, ASYMMETRIC: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """As `score_absorbed`, of codes and of queries that are whole numbers (`store_whole_queries`).

    WHICH: of SHARED_BY groups of warps each has every other tile, and a buffer of its own.
    """
    tiles, latents, stored, mask, width, latents_t, row_mask, mask_t = arguments
    SLOTS: gl.constexpr = queries.shape[0] // 2
    STAGES: gl.constexpr = ring[0].shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 2 * SLOTS, 32])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    first, step, begin, end, length = tiles
    begin += WHICH
    for stage in gl.static_range(STAGES):
        copy_tile(ring, stage, latents, tiles, begin + SHARED_BY * stage, latents_t, width)
    parameters = load_parameters(stored, tiles, begin, rows, BITS, ASYMMETRIC)
    zeros = gl.zeros([TILE, 2 * SLOTS], gl.int32, layout)
    nothing = whole_of(zeros)
    by_slot: gl.constexpr = gl.SliceLayout(0, nothing.type.layout)
    unit, total = units.index(0).load(by_slot), units.index(1).load(by_slot)
    for index in range(begin, end, SHARED_BY):
        done = (index - begin) // SHARED_BY
        EITHER: gl.constexpr = SHARED_BY == 1
        token = (first + index * step) * TILE + gl.arange(0, TILE, rows)
        seen = load_seen(mask, row_mask, mask_t, token, token < length, MASK)
        next_parameters = load_parameters(stored, tiles, index + SHARED_BY, rows, BITS, ASYMMETRIC)
        async_copy.wait_group(STAGES - 1)
        synchronize()
        operand = key_bytes(ring, done % STAGES, layout, BITS)
        begun = warpgroup_mma(operand, queries.permute((1, 0)), zeros, use_acc=False, is_async=True)
        # All have read the latents.
        synchronize()
        copy_tile(ring, done % STAGES, latents, tiles, index + SHARED_BY * STAGES, latents_t, width)
        mbarrier.wait(buffer_in(empty, WHICH, done, EITHER), phase_of(done, EITHER) ^ 1)
        scale = scale_of(parameters, 0, ASYMMETRIC)
        shift = zero_of(parameters, 0, rows, BITS, ASYMMETRIC) - taken_away(BITS)
        shift = gl.convert_layout(shift, gl.SliceLayout(1, nothing.type.layout), assert_trivial=True)
        logarithm = logarithm_of(parameters, seen, rows, BITS, ASYMMETRIC)
        place = place_of_scales(WHICH, done, EITHER)
        hand_on_parameters(scales, place, parameters, seen, rows, VALUE_BITS, ASYMMETRIC, True)
        score = whole_of(warpgroup_mma_wait(0, deps=[begun])) * unit[None, :] - shift[:, None] * total[None, :]
        to = buffer_in(found, WHICH, done, EITHER)
        if to.shape[1] > SLOTS:
            to = to.slice(0, SLOTS, dim=1)
        hand_on(to, score, seen, scale, logarithm)
        parameters = next_parameters
        synchronize()
        mbarrier.arrive(buffer_in(full, WHICH, done, EITHER), count=1)
    async_copy.wait_group(0)
    allow_launch_after()


@gluon.jit
def score_absorbed(
    found, scales, full, empty, ring, queries, arguments,
    BITS: gl.constexpr, VALUE_BITS: gl.constexpr, ASYMMETRIC: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of all tiles with queries that the up factor is multiplied into, [slots, RANK]; two buffers by turns."""
    tiles, latents, stored, mask, units, latents_t, row_mask, mask_t = arguments
    SLOTS: gl.constexpr = queries.shape[0]
    STAGES: gl.constexpr = ring[0].shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SLOTS, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    first, step, begin, end, length = tiles
    for stage in gl.static_range(STAGES):
        copy_tile(ring, stage, latents, tiles, begin + stage, latents_t, units)
    parameters = load_parameters(stored, tiles, begin, rows, BITS, ASYMMETRIC)
    zeros = gl.zeros([TILE, SLOTS], gl.float32, layout)
    for index in range(begin, end):
        done = index - begin
        token = (first + index * step) * TILE + gl.arange(0, TILE, rows)
        seen = load_seen(mask, row_mask, mask_t, token, token < length, MASK)
        next_parameters = load_parameters(stored, tiles, index + 1, rows, BITS, ASYMMETRIC)
        loaded, scale = loaded_of(ring, done % STAGES, parameters, 0, STAGES, layout, BITS, ASYMMETRIC, False, False)
        operand = operand_of(loaded, 0, BITS, False, False)
        begun = warpgroup_mma(operand, queries.permute((1, 0)), zeros, use_acc=False, is_async=True)
        # All have read the latents.
        synchronize()
        copy_tile(ring, done % STAGES, latents, tiles, index + STAGES, latents_t, units)
        mbarrier.wait(buffer_in(empty, 0, done, True), phase_of(done, True) ^ 1)
        logarithm = logarithm_of(parameters, seen, rows, BITS, ASYMMETRIC)
        place = place_of_scales(0, done, True)
        hand_on_parameters(scales, place, parameters, seen, rows, VALUE_BITS, ASYMMETRIC, False)
        score, operand = warpgroup_mma_wait(0, deps=[begun, operand])
        hand_on(buffer_in(found, 0, done, True), score, seen, scale, logarithm)
        parameters = next_parameters
        synchronize()
        mbarrier.arrive(buffer_in(full, 0, done, True), count=1)
    async_copy.wait_group(0)
    allow_launch_after()
