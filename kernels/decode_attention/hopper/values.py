"""The half of the kernel that weighs the values."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from palu.kernels.decode_attention.hopper.common import (
    TILE,
    WARPS,
    bits_of,
    copy_rows,
    synchronize,
)
from palu.kernels.decode_attention.hopper.fields import planes_of
from palu.kernels.decode_attention.hopper.operands import (
    CHUNK,
    by_latent,
    codes_of_numbers,
    value_operand,
    value_units,
)
from palu.kernels.decode_attention.hopper.parameters import place_of_scales
from palu.kernels.decode_attention.hopper.softmax import (
    hand_back,
    head_of,
    load_scores,
    logarithm_and_scale,
    softmax,
    store_excess,
    weights_layout,
)
from palu.kernels.decode_attention.kernel import LOWEST

# Slots with which there are no registers for more than sums.
MANY_SLOTS: gl.constexpr = gl.constexpr(32)


@gluon.jit
def _there(sums):
    """Sums of which all products are done."""
    waited = warpgroup_mma_wait(0, deps=sums)
    # A single one comes as it is.
    return (waited,) if len(sums) == 1 else waited


@gluon.jit
def copy_step(rings, stage, latents, tiles, begin, number, latents_t, units, EVERY: gl.constexpr):
    """Start copying step `number` of every EVERY-th tile from `begin` on, `units` numbers, or units or bytes of a
    plane, each.

    Nothing is read behind the last tile. latents, latents_t: of every plane; rings: of every chunk, plane after plane.
    """
    first, step, _, end, length = tiles
    ROWS: gl.constexpr = rings[0].shape[1]
    UNITS: gl.constexpr = rings[0].shape[2]
    STEPS: gl.constexpr = TILE // ROWS
    index = begin + number // STEPS * EVERY
    token = (first + index * step) * TILE + number % STEPS * ROWS
    until = gl.where(index < end, length, 0)
    CHUNKS: gl.constexpr = len(rings) // len(latents)
    for piece in gl.static_range(len(rings)):
        copy_rows(
            rings[piece].index(stage), latents[piece // CHUNKS], token, latents_t[piece // CHUNKS], until,
            piece % CHUNKS * UNITS, units, ROWS, UNITS,
        )  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def start_copies(rings, arguments, WHICH: gl.constexpr, SHARED_BY: gl.constexpr):
    """Start copying the first steps' values, of a group of warps that weighs: as `weigh_values` and `weigh_whole`."""
    _, _, _, _, tiles, latents, _, _, _, latents_t, units = arguments
    for stage in gl.static_range(rings[0].shape[0] - 1):
        copy_step(rings, stage, latents, tiles, tiles[2] + WHICH, stage, latents_t, units, SHARED_BY)


@gluon.jit
def _weigh_codes(rings, stage, first, weights, summed, BITS: gl.constexpr):
    """Add a step's values, chunk after chunk: numbers are made of one's codes while the other's product is under way.

    first: the first chunk's numbers.
    """
    result: gl.constexpr = summed[0].type.layout
    transposed = weights.permute((1, 0))
    done = ()
    operand = first
    if len(summed) > 1:
        # Asked for a product before they are needed.
        packed = value_units(rings, stage, 1, BITS)
    under_way = warpgroup_mma(operand, transposed, summed[0], is_async=True)
    for chunk in gl.static_range(1, len(summed)):
        following = value_operand(packed, result, BITS)
        if chunk + 1 < len(summed):
            packed = value_units(rings, stage, chunk + 1, BITS)
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
    few = max(bits, 3)
    rows = {16: [[8, 0], [64, 0]], 8: [[1, 0], [16, 0]], 4: [[1, 0], [2, 0]], 3: [[1, 0], [2, 0]]}[few]
    first_lane = {16: 1, 8: 2, 4: 4, 3: 8}[few]
    lanes = [[first_lane << bit, 0] for bit in range(3)]
    warps = {16: [[16, 0], [32, 0]], 8: [[32, 0], [64, 0]], 4: [[32, 0], [64, 0]], 3: [[64, 0], [4, 0]]}[few]
    columns = [[0, 1 << bit] for bit in range(bits_of(slots))]
    first = 0 if halved else 1
    held = [*columns[:first], *columns[first + 2 :]]
    # Neighbouring latents of a thread are stored at once.
    return gl.DistributedLinearLayout([*rows, *held], [*columns[first : first + 2], *lanes], warps, [], [128, slots])


@gluon.jit
def store_means(
    means, out, summed, of_slots, scale, away, rank, layout: gl.constexpr, KV: gl.constexpr, QUERIES: gl.constexpr,
    QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr, RANK_STRIDE: gl.constexpr,
    BITS: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Store means: sums [CHUNK, slots] of every chunk times scales, less what codes' shifts make of them.

    scale, away: by slot in use; of_slots: float32 [2, slots or more], through which all warps get them. WHOLE: of whole
    numbers, else, of codes, of what `value_operand` makes of them.
    """
    SLOTS: gl.constexpr = summed[0].shape[1]
    column = gl.arange(0, SLOTS, gl.SliceLayout(0, layout))
    head, there = head_of(column, KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS)
    at_head = means + (out + head).to(gl.int64) * RANK_STRIDE
    by_slot: gl.constexpr = gl.SliceLayout(0, layout)
    USED: gl.constexpr = scale.shape[0]
    of_slots.index(0).slice(0, USED).store(scale)
    if BITS < 16:
        of_slots.index(1).slice(0, USED).store(away)
    synchronize()
    scale = of_slots.index(0).slice(0, SLOTS).load(by_slot)
    if BITS < 16:
        away = of_slots.index(1).slice(0, SLOTS).load(by_slot)
    for chunk in gl.static_range(len(summed)):
        latent = chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        ok = (latent < rank)[:, None] & there[None, :]
        numbers = gl.convert_layout(by_latent(summed[chunk], BITS), layout, assert_trivial=True)
        of_latents = scale[None, :]
        if BITS < 16 and not WHOLE:
            if SLOTS < MANY_SLOTS:
                # The same for many latents: the compiler multiplies once, where there are registers.
                of_latents *= codes_of_numbers(latent, BITS)[:, None]
            else:
                numbers *= codes_of_numbers(latent, BITS)[:, None]
        numbers *= of_latents
        if BITS < 16:
            numbers -= away[None, :]
        gl.store(at_head[None, :] + latent[:, None], numbers.to(means.dtype.element_ty), mask=ok)


@gluon.jit
def weigh_values(
    rings, weights, excess, of_slots, out, arguments, WHICH: gl.constexpr, SHARED_BY: gl.constexpr, KV: gl.constexpr,
    QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr,
    RANK_STRIDE: gl.constexpr, BITS: gl.constexpr,
):  # fmt: skip
    """Means of the value latents of the tiles first + index * step, weighed with the scores' exponentials.

    WHICH: of SHARED_BY groups of warps each has every other tile, and parts of its own. `start_copies` has
    begun.
    Codes of two tiles at a time, if they are its own. rings: shared memory [stages, tokens of a step, units] of every
    chunk; weights: of each step of these tiles [slots, tokens of a step]; excess: int32 [warps], for scores above the
    references; of_slots: as `store_means` takes it; out: the group's first head in the part's logarithms.
    """
    found, scales, full, empty, tiles, latents, means, logarithms, rank, latents_t, units = arguments
    STEPS: gl.constexpr = len(weights)
    SLOTS: gl.constexpr = weights[0].shape[0]
    STEP: gl.constexpr = weights[0].shape[1]
    TILES: gl.constexpr = STEPS * STEP // TILE
    # One tile is in either of two buffers.
    EITHER: gl.constexpr = TILES == 1 and SHARED_BY == 1
    CHUNKS: gl.constexpr = len(rings) // planes_of(BITS)
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
    for index in range(begin, end, TILES * SHARED_BY):
        done = (index - begin) // (TILES * SHARED_BY)
        number = gl.minimum(end - index, TILES)
        scores = load_scores(full, found, WHICH, done, number, there, STEP, TILES, EITHER)
        store_excess(excess, scores, reference)
        async_copy.wait_group(STAGES - 2)
        if BITS == 16:
            fence_async_shared()
        # The first step is there, products of the last tile are done in all warps, its weights may be written over.
        synchronize()
        hand_back(empty, WHICH, done, TILES, EITHER)
        if BITS < 16:
            # Numbers are made of the first codes beside the softmax.
            operand = value_operand(value_units(rings, done * STEPS % STAGES, 0, BITS), result, BITS)
        place = place_of_scales(WHICH, done, EITHER)
        reference, total, shifted, summed = softmax(
            scores, excess, scales, place, weights, reference, total, shifted, summed, BITS
        )
        for part in gl.static_range(STEPS):
            step = done * STEPS + part
            if part > 0:
                async_copy.wait_group(STAGES - 2)
                if BITS == 16:
                    summed = _there(summed)
            if part == 0 or BITS == 16:
                fence_async_shared()
            synchronize()
            ahead = step + STAGES - 1
            if BITS < 16:
                # The slot that is written has been read by all.
                copy_step(rings, ahead % STAGES, latents, tiles, begin, ahead, latents_t, units, SHARED_BY)
                if part > 0:
                    operand = value_operand(value_units(rings, step % STAGES, 0, BITS), result, BITS)
                summed = _weigh_codes(rings, step % STAGES, operand, weights[part], summed, BITS)
            else:
                summed = _weigh_numbers(rings, step % STAGES, weights[part], summed)
                copy_step(rings, ahead % STAGES, latents, tiles, begin, ahead, latents_t, units, SHARED_BY)
        if BITS == 16:
            summed = _there(summed)
    async_copy.wait_group(0)
    logarithm, scale = logarithm_and_scale(reference, gl.sum(total, 1))
    gl.store(logarithms + out + head, logarithm, mask=there)
    store_means(
        means, out, summed, of_slots, scale, gl.sum(shifted, 1) * scale, rank, latents_layout(SLOTS, BITS, False),
        KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS, RANK_STRIDE, BITS, False,
    )  # fmt: skip
