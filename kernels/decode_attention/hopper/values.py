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

from palu.kernels.decode_attention.hopper.common import TILE, WARPS, bits_of, copy_rows, exp2, synchronize
from palu.kernels.decode_attention.hopper.operands import by_latent, kv_head_of, value_operand
from palu.kernels.decode_attention.kernel import LOWEST

# Weights are 2 ** HEADROOM where they are relative to the largest score so far, and never more than 2 ** MOST.
HEADROOM: gl.constexpr = gl.constexpr(8.0)
MOST: gl.constexpr = gl.constexpr(15.0)
# Latents of a product.
CHUNK: gl.constexpr = gl.constexpr(128)


@gluon.constexpr_function
def weights_layout(slots: int, tokens: int) -> gl.DistributedLinearLayout:
    """Weights [slots, tokens]: a warp has a quarter of the slots, a lane up to eight neighbouring tokens of some."""
    own = slots // WARPS.value
    each = min(8, max(1, own * tokens // 32))
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
def _of_all_slots(numbers, SLOTS: gl.constexpr, other: gl.constexpr):
    """Numbers [slots in use] with another one for the slots behind."""
    USED: gl.constexpr = numbers.shape[0]
    everywhere: gl.constexpr = _everywhere(USED)
    numbers = gl.convert_layout(numbers, everywhere)
    if USED < SLOTS:
        both = gl.join(numbers, gl.full_like(numbers, other))
        numbers = both.permute([1, 0]).reshape([SLOTS])
    return numbers


@gluon.jit
def _rescaled(sums, factor):
    """Sums [CHUNK, slots] times factors [slots in use]."""
    factor = _of_all_slots(factor, sums[0].shape[1], 1.0)
    result = ()
    for chunk in gl.static_range(len(sums)):
        by_column = gl.convert_layout(factor, gl.SliceLayout(0, sums[chunk].type.layout))
        result = result + (sums[chunk] * by_column[None, :],)
    return result


@gluon.jit
def _there(sums):
    """Sums of which all products are done."""
    waited = warpgroup_mma_wait(0, deps=sums)
    # A single one comes as it is.
    return (waited,) if len(sums) == 1 else waited


@gluon.jit
def head_of(
    slot, KV: gl.constexpr, QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """Which of the group's query heads has a slot, and whether any has."""
    kv_head, query = kv_head_of(slot, QUERY_SLOTS, TOGETHER, COLUMNS)
    return kv_head * QUERIES + query, (kv_head < KV) & (query < QUERIES)


@gluon.jit
def copy_step(rings, stage, latents, tiles, begin, number, latents_t, units, EVERY: gl.constexpr):
    """Start copying step `number` of every EVERY-th tile from `begin` on, `units` numbers of 16 bits each.

    Nothing is read behind the last tile.
    """
    first, step, _, end, length = tiles
    ROWS: gl.constexpr = rings[0].shape[1]
    UNITS: gl.constexpr = rings[0].shape[2]
    STEPS: gl.constexpr = TILE // ROWS
    index = begin + number // STEPS * EVERY
    token = (first + index * step) * TILE + number % STEPS * ROWS
    until = gl.where(index < end, length, 0)
    for chunk in gl.static_range(len(rings)):
        copy_rows(rings[chunk].index(stage), latents, token, latents_t, until, chunk * UNITS, units, ROWS, UNITS)
    async_copy.commit_group()


@gluon.jit
def scores_of(found, buffer, first, STEP: gl.constexpr, USED: gl.constexpr):
    """Scores of a step's tokens in the slots in use, shared memory [slots, tokens]."""
    scores = found.index(buffer).slice(first, STEP, dim=0)
    if found.shape[2] > USED:
        scores = scores.slice(0, USED, dim=1)
    return scores.permute((1, 0))


@gluon.jit
def _stored(weights, part: gl.constexpr, rounded):
    """Store a step's weights [slots in use, tokens], zero in the other slots."""
    SLOTS: gl.constexpr = weights.shape[1]
    USED: gl.constexpr = rounded.shape[0]
    STEP: gl.constexpr = rounded.shape[1]
    if USED < SLOTS:
        both = gl.join(rounded, gl.zeros_like(rounded))
        rounded = both.permute([2, 0, 1]).reshape([SLOTS, STEP])
    weights.index(part).store(rounded)


@gluon.jit
def load_scores(found, first, number, there, STEP: gl.constexpr, TILES: gl.constexpr):
    """Scores [slots in use, STEP] of `number` of TILES tiles, from buffer `first` on, step by step."""
    USED: gl.constexpr = there.shape[0]
    scores = ()
    for tile in gl.static_range(TILES):
        for step in gl.static_range(TILE // STEP):
            score = scores_of(found, first + tile, step * STEP, STEP, USED).load(weights_layout(USED, STEP))
            scores = scores + (gl.where((there & (tile < number))[:, None], score, float("-inf")),)
    return scores


@gluon.jit
def parameters_of(scales, first, part: gl.constexpr, number, STEP: gl.constexpr, layout: gl.constexpr):
    """One over the scales, and the shifts, of step `part` of `number` tiles' values, from buffer `first` on."""
    STEPS: gl.constexpr = TILE // STEP
    at = 2 * (first + part // STEPS)
    inverse = scales.index(at).slice(part % STEPS * STEP, STEP).load(layout)
    shift = scales.index(at + 1).slice(part % STEPS * STEP, STEP).load(layout)
    # Of a tile that is not there they may be anything.
    there = part // STEPS < number
    return gl.where(there, inverse, 0.0), gl.where(there, shift, 0.0)


@gluon.jit
def _highest(scores):
    """The larger score of every slot and token, of all steps."""
    highest = scores[0]
    for part in gl.static_range(1, len(scores)):
        highest = gl.maximum(highest, scores[part])
    return highest


@gluon.jit
def _store_excess(excess, scores, reference):
    """Whether some of a warp's scores are far above their references, to shared memory [warps]."""
    above = (_highest(scores) - reference[:, None] > MOST).to(gl.int32)
    # One instruction finds the largest integer of a warp.
    excess.store(gl.max(above.reshape([WARPS, above.shape[0] // WARPS * above.shape[1]]), 1))


@gluon.jit
def _softmax(
    scores, excess, scales, buffer, number, weights, reference, total, shifted, summed, BITS: gl.constexpr
):  # fmt: skip
    """Stores the weights of tiles' scores, relative to references [slots in use].

    References rise where scores are far above them, by `excess`; returns them, the weights added up, as they are and
    times the codes' shifts, and the sums of values, all relative to the new ones. Of codes, scores have the logarithm
    of the values' scales added, so the weights are times the scales.
    """
    STEP: gl.constexpr = weights.shape[2]
    USED: gl.constexpr = reference.shape[0]
    of_tokens: gl.constexpr = gl.SliceLayout(0, weights_layout(USED, STEP))
    if gl.max(excess.load(_everywhere(WARPS.value)), 0) > 0:
        peak = gl.max(_highest(scores), 1)
        higher = gl.where(peak - reference > MOST, peak - HEADROOM, reference)
        factor = exp2(reference - higher)
        summed = _rescaled(summed, factor)
        total *= factor[:, None]
        if BITS < 16:
            shifted *= factor[:, None]
        reference = higher
    for part in gl.static_range(len(scores)):
        weight = exp2(scores[part] - reference[:, None])
        rounded = weight.to(weights.dtype)
        _stored(weights, part, rounded)
        if BITS < 16:
            inverse, shift = parameters_of(scales, buffer, part, number, STEP, of_tokens)
            total += weight * inverse[None, :]
            shifted += rounded.to(gl.float32) * shift[None, :]
        else:
            total += weight
    return reference, total, shifted, summed


@gluon.jit
def _weigh_codes(rings, stage, first, weights, summed, BITS: gl.constexpr):
    """Add a step's values, chunk after chunk: numbers are made of one's codes while the other's product is under way.

    first: the first chunk's numbers.
    """
    result: gl.constexpr = summed[0].type.layout
    transposed = weights.permute((1, 0))
    done = ()
    operand = first
    under_way = warpgroup_mma(operand, transposed, summed[0], is_async=True)
    for chunk in gl.static_range(1, len(rings)):
        following = value_operand(rings[chunk].index(stage), result, BITS)
        begun = warpgroup_mma(following, transposed, summed[chunk], is_async=True)
        under_way, operand = warpgroup_mma_wait(1, deps=[under_way, operand])
        done = done + (under_way,)
        under_way, operand = begun, following
    under_way, operand = warpgroup_mma_wait(0, deps=[under_way, operand])
    return done + (under_way,)


@gluon.jit
def _weigh_numbers(rings, stage, weights, summed):
    """Add a step's values, which are numbers in shared memory; their products are under way."""
    started = ()
    for chunk in gl.static_range(len(rings)):
        operand = rings[chunk].index(stage).permute((1, 0))
        started = started + (warpgroup_mma(operand, weights.permute((1, 0)), summed[chunk], is_async=True),)
    return started


@gluon.constexpr_function
def latents_layout(slots: int, bits: int, halved: bool) -> gl.DistributedLinearLayout:
    """Sums [CHUNK, slots] as products have them, latent after latent; halved: neighbouring columns are one."""
    rows = {16: [[8, 0], [64, 0]], 8: [[1, 0], [16, 0]], 4: [[1, 0], [2, 0]]}[bits]
    lanes = {16: [[1, 0], [2, 0], [4, 0]], 8: [[2, 0], [4, 0], [8, 0]], 4: [[4, 0], [8, 0], [16, 0]]}[bits]
    warps = [[16, 0], [32, 0]] if bits == 16 else [[32, 0], [64, 0]]
    columns = [[0, 1 << bit] for bit in range(bits_of(slots))]
    first = 0 if halved else 1
    held = [*columns[:first], *columns[first + 2 :]]
    # Neighbouring latents of a thread are stored at once.
    return gl.DistributedLinearLayout([*rows, *held], [*columns[first : first + 2], *lanes], warps, [], [128, slots])


@gluon.jit
def store_sums(
    sums, out, summed, away, rank, ours, layout: gl.constexpr, KV: gl.constexpr, QUERIES: gl.constexpr,
    QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr, RANK_STRIDE: gl.constexpr,
    BITS: gl.constexpr,
):  # fmt: skip
    """Store sums [CHUNK, slots] of every chunk, less what codes' shifts make of them [slots]."""
    SLOTS: gl.constexpr = summed[0].shape[1]
    column = gl.arange(0, SLOTS, gl.SliceLayout(0, layout))
    head, there = head_of(column, KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS)
    at_head = sums + (out + head).to(gl.int64) * RANK_STRIDE
    away = gl.convert_layout(away, gl.SliceLayout(0, layout))
    for chunk in gl.static_range(len(summed)):
        latent = chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        ok = (latent < rank)[:, None] & (there & ours)[None, :]
        numbers = gl.convert_layout(by_latent(summed[chunk], BITS), layout, assert_trivial=True)
        gl.store(at_head[None, :] + latent[:, None], numbers - away[None, :], mask=ok)


@gluon.jit
def weigh_values(
    rings, weights, excess, out, arguments, WHICH: gl.constexpr, SHARED_BY: gl.constexpr, KV: gl.constexpr,
    QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr,
    RANK_STRIDE: gl.constexpr, BITS: gl.constexpr,
):  # fmt: skip
    """Sums of the value latents of the tiles first + index * step, weighed with the scores' exponentials.

    WHICH: of SHARED_BY groups of warps each has every other tile, and a part of the sums of its own.
    Codes of two tiles at a time, if they are its own. rings: shared memory [stages, tokens of a step, units] of every
    chunk; weights: [steps of these tiles, slots, tokens of a step]; excess: int32 [warps], for scores above the references;
    out: the group's first head in the part's totals and peaks.
    """
    found, scales, full, empty, tiles, latents, sums, totals, peaks, rank, latents_t, ours = arguments
    STEPS: gl.constexpr = weights.shape[0]
    SLOTS: gl.constexpr = weights.shape[1]
    STEP: gl.constexpr = weights.shape[2]
    TILES: gl.constexpr = STEPS * STEP // TILE
    # One tile is in either of two buffers.
    EITHER: gl.constexpr = TILES == 1 and SHARED_BY == 1
    CHUNKS: gl.constexpr = len(rings)
    STAGES: gl.constexpr = rings[0].shape[0]
    # Few heads leave half of the slots empty.
    HALF: gl.constexpr = COLUMNS == SLOTS and 2 * ((KV - 1) * QUERY_SLOTS + QUERIES) <= SLOTS
    USED: gl.constexpr = SLOTS // 2 if HALF else SLOTS
    layout: gl.constexpr = weights_layout(USED, STEP)
    slot = gl.arange(0, USED, gl.SliceLayout(1, layout))
    head, there = head_of(slot, KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS)
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SLOTS, 16])
    reference = gl.full([USED], LOWEST, gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([USED, STEP], gl.float32, layout)
    shifted = gl.zeros([USED, STEP], gl.float32, layout)
    summed = ()
    for _chunk in gl.static_range(CHUNKS):
        summed = summed + (gl.zeros([CHUNK, SLOTS], gl.float32, result),)
    _, _, begin, end, _ = tiles
    begin += WHICH
    units = gl.multiple_of(rank * BITS // 16, 8)
    for stage in gl.static_range(STAGES - 1):
        copy_step(rings, stage, latents, tiles, begin, stage, latents_t, units, SHARED_BY)
    for index in range(begin, end, TILES * SHARED_BY):
        done = (index - begin) // (TILES * SHARED_BY)
        number = gl.minimum(end - index, TILES)
        buffer, round = WHICH, done
        if EITHER:
            buffer, round = done % 2, done // 2
        mbarrier.wait(full.index(buffer), round & 1)
        if TILES == 2:
            if number == 2:
                mbarrier.wait(full.index(1), round & 1)
        async_copy.wait_group(STAGES - 2)
        if BITS == 16:
            fence_async_shared()
        scores = load_scores(found, buffer, number, there, STEP, TILES)
        _store_excess(excess, scores, reference)
        # The first step is there, products of the last tile are done in all warps, its weights may be written over.
        synchronize()
        if BITS < 16:
            # Numbers are made of the first codes beside the softmax.
            operand = value_operand(rings[0].index(done * STEPS % STAGES), result, BITS)
        reference, total, shifted, summed = _softmax(
            scores, excess, scales, buffer, number, weights, reference, total, shifted, summed, BITS
        )
        for part in gl.static_range(STEPS):
            number = done * STEPS + part
            if part > 0:
                async_copy.wait_group(STAGES - 2)
                if BITS == 16:
                    summed = _there(summed)
            if part == 0 or BITS == 16:
                fence_async_shared()
            synchronize()
            if part == 0:
                # All have read the scores.
                for tile in gl.static_range(TILES):
                    mbarrier.arrive(empty.index(buffer + tile), count=1)
            ahead = number + STAGES - 1
            if BITS < 16:
                # The slot that is written has been read by all.
                copy_step(rings, ahead % STAGES, latents, tiles, begin, ahead, latents_t, units, SHARED_BY)
                if part > 0:
                    operand = value_operand(rings[0].index(number % STAGES), result, BITS)
                summed = _weigh_codes(rings, number % STAGES, operand, weights.index(part), summed, BITS)
            else:
                summed = _weigh_numbers(rings, number % STAGES, weights.index(part), summed)
                copy_step(rings, ahead % STAGES, latents, tiles, begin, ahead, latents_t, units, SHARED_BY)
        if BITS == 16:
            summed = _there(summed)
    async_copy.wait_group(0)
    there = there & ours
    gl.store(totals + out + head, gl.sum(total, 1), mask=there)
    gl.store(peaks + out + head, reference, mask=there)
    away = gl.zeros([SLOTS], gl.float32, gl.SliceLayout(1, layout))
    if BITS < 16:
        away = _of_all_slots(gl.sum(shifted, 1), SLOTS, 0.0)
    store_sums(
        sums, out, summed, away, rank, ours, latents_layout(SLOTS, BITS, False), KV, QUERIES, QUERY_SLOTS, TOGETHER,
        COLUMNS, RANK_STRIDE, BITS,
    )  # fmt: skip
