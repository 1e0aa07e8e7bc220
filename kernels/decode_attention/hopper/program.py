"""What a program does: which tiles it has, and the memory of its groups of warps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from palu.kernels.decode_attention.hopper.common import TILE, WARPS, seen_as, visible_tiles
from palu.kernels.decode_attention.hopper.fields import fields_of, planes_of
from palu.kernels.decode_attention.hopper.operands import CHUNK, swizzled
from palu.kernels.decode_attention.hopper.warps import LINES, attend_absorbed, attend_rebuilt, ring_of


@gluon.jit
def attend(
    given, part, parts, out, lead, leading, end_tile, table, table_t, OF: gl.constexpr, PLAN: gl.constexpr
):  # fmt: skip
    """The part of a row's means that a program of `hopper_kernel` has, of its heads.

    given: what does not depend on the mode, at the row and the heads: of tokens, values, keys, queries, the up factor,
    windows and what is stored, a tuple each; of every key group what is its own, as tuples.
    part, parts: which of the programs for these heads; out: where its means are stored. lead, leading, end_tile: of
    windows, the row of `spans_of`. OF: `StretchConstants`, PLAN: its `PlanConstants`.
    """
    tokens, values, keys, queries, factor, basis, results = given
    length, mask, row_mask, mask_t = tokens
    MODE: gl.constexpr = PLAN.mode
    SPAN: gl.constexpr = PLAN.span
    STEP: gl.constexpr = PLAN.step
    VALUE_STAGES: gl.constexpr = PLAN.value_stages
    SLOTS: gl.constexpr = OF.slots
    CHUNKS: gl.constexpr = OF.chunks
    MASK: gl.constexpr = OF.mask
    DTYPE: gl.constexpr = OF.dtype
    BITS: gl.constexpr = OF.bits
    VALUE_BITS: gl.constexpr = OF.value_bits
    SCORERS: gl.constexpr = OF.scorers
    WEIGHERS: gl.constexpr = OF.weighers
    WHOLE: gl.constexpr = OF.whole
    stored: gl.constexpr = DTYPE if BITS == 16 else gl.int16
    value_units: gl.constexpr = CHUNK // fields_of(VALUE_BITS)
    # Of codes, of two tiles.
    STEPS: gl.constexpr = (2 // WEIGHERS if BITS < 16 else 1) * TILE // STEP
    # Buffers of their own for chunks, steps and groups that score, so that the compiler sees that they do not overlap:
    # else all warps of a group would wait for each other between them.
    memories = ()
    for _weigher in gl.static_range(WEIGHERS):
        value_rings = ()
        for plane in gl.static_range(planes_of(VALUE_BITS)):
            for _chunk in gl.static_range(CHUNKS):
                value_rings = value_rings + (ring_of(stored, VALUE_STAGES, STEP, value_units, plane),)
        weights = ()
        if WHOLE > 0:
            for _step in gl.static_range(STEPS):
                some = gl.allocate_shared_memory(gl.int8, [2, 2 * WHOLE, STEP], gl.NVMMASharedLayout(STEP, 8, rank=2))
                weights = weights + (some,)
            tops = gl.allocate_shared_memory(gl.float32, [2, WHOLE], LINES)
        else:
            for _step in gl.static_range(STEPS):
                weights = weights + (gl.allocate_shared_memory(DTYPE, [SLOTS, STEP], swizzled(STEP)),)
            tops = gl.allocate_shared_memory(gl.int32, [WARPS], LINES)
        of_slots = gl.allocate_shared_memory(gl.float32, [2, SLOTS], LINES)
        memories = memories + ((value_rings, weights, tops, of_slots),)
    # Of tiles of codes that two groups score; else both buffers are one's, or taken in turn.
    OWN: gl.constexpr = 2 if SCORERS == 2 and BITS < 16 else 1
    BUFFERS: gl.constexpr = 2 // OWN
    found, full, empty, scales = (), (), (), ()
    for own in gl.static_range(OWN):
        some = gl.allocate_shared_memory(gl.float32, [BUFFERS, TILE, SLOTS], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
        found = found + (some,)
        full = full + (gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout()),)
        # What is weighed together is handed back together.
        if own == 0 or WEIGHERS == 2:
            empty = empty + (gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout()),)
        else:
            empty = empty + (empty[0],)
        for buffer in gl.static_range(BUFFERS):
            mbarrier.init(full[own].index(buffer), count=1)
            if own == 0 or WEIGHERS == 2:
                mbarrier.init(empty[own].index(buffer), count=1)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=2)
    # Of a tile's values: one over the scale, and the shift; finite ones before there is a tile.
    ZEROS: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WARPS, 1], [1, 0])
    for _kind in gl.static_range(2):
        some = gl.allocate_shared_memory(gl.float32, [4, TILE], LINES)
        scales = scales + (some,)
        if BITS < 16:
            all_of_them = seen_as(some, 1, 4, TILE, gl.SwizzledSharedLayout(1, 1, 1, [1, 0])).index(0)
            all_of_them.store(gl.zeros([4, TILE], gl.float32, ZEROS))
    if SPAN > 0:
        # The program's tiles: neighbours, of those with visible tokens.
        many = end_tile - leading
        begin, end = leading + many * part // parts, leading + many * (part + 1) // parts
        tiles = (0, 1, begin, end, length)
    else:
        # The program's tiles: every parts-th one, so that all have as many visible ones.
        count = gl.maximum(0, gl.cdiv(gl.cdiv(length, TILE) - part, parts))
        begin, end = visible_tiles(mask, row_mask, mask_t, part, parts, count, length, MASK)
        tiles = (part, parts, begin, end, length)
    to_values = (found, scales, full, empty, tiles, values[0], results[0], results[1], values[1], values[3], values[2])
    memory = (found, full, empty, scales, ready, memories)
    if MODE == "absorbed":
        attend_absorbed(memory, tiles, tokens, keys, queries, to_values, results[2], out, OF, PLAN)
    else:
        table = (table, table_t, lead + begin * TILE)
        attend_rebuilt(memory, tiles, tokens, keys, queries, factor, basis, table, to_values, out, OF, PLAN)
