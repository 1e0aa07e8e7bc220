"""What a program does: its groups of four warps score and weigh its tiles, through the shared memory between them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from palu.kernels.decode_attention.hopper.absorbed import score_absorbed, score_absorbed_codes, store_whole_queries
from palu.kernels.decode_attention.hopper.common import TILE, WARPS, seen_as, synchronize, visible_tiles
from palu.kernels.decode_attention.hopper.fields import fields_of, planes_of
from palu.kernels.decode_attention.hopper.operands import CHUNK, swizzled
from palu.kernels.decode_attention.hopper.prologue import bias_columns, load_queries, there_if
from palu.kernels.decode_attention.hopper.scores import score_rebuilt
from palu.kernels.decode_attention.hopper.slow import make_first_window
from palu.kernels.decode_attention.hopper.turns import LEAST, UNIT
from palu.kernels.decode_attention.hopper.values import start_copies, weigh_values
from palu.kernels.decode_attention.hopper.whole import weigh_whole
from palu.kernels.decode_attention.hopper.windows import PIECES, own_parts, parts_of_latents

# Shared memory of one dimension, line after line.
LINES: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
BYTES: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _ring(stored: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr, PLANE: gl.constexpr):
    """Shared memory [stages, rows, units] for what is stored, or for the bytes of a second plane."""
    if PLANE == 0:
        ring = gl.allocate_shared_memory(stored, [STAGES, ROWS, UNITS], swizzled(UNITS))
    else:
        ring = gl.allocate_shared_memory(gl.uint8, [STAGES, ROWS, UNITS], BYTES)
    return ring


@gluon.jit
def _score_absorbed(
    buffers, ring, queries, units, arguments, WHICH: gl.constexpr, SHARED_BY: gl.constexpr, KIND: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Score latents; KIND: what both take last, in their order; WHOLE: as in `_weigh`."""
    found, scales, full, empty = buffers
    if WHOLE > 0:
        score_absorbed_codes(
            found, scales, full, empty, ring, queries, units, arguments, WHICH, SHARED_BY, KIND[0], KIND[1], KIND[2],
            KIND[3],
        )  # fmt: skip
    else:
        score_absorbed(found, scales, full, empty, ring, queries, arguments, KIND[0], KIND[1], KIND[2], KIND[3])


@gluon.jit
def _weigh(
    window, ready, memory, out, arguments, WHICH: gl.constexpr, SHARED_BY: gl.constexpr, WIDTH: gl.constexpr,
    KIND: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Weigh values; KIND: what both take last, in their order; WHOLE: slots of weights that are whole numbers, or 0.

    window: what `make_first_window` takes first, where this group of warps makes it, or (). ready: a barrier that both
    groups that score arrive at once, if there is a tile, when what tiles are multiplied with is there, or ().
    """
    if len(window) > 0:
        make_first_window(window[0], window[1], memory[0], window[2], arguments, KIND, WIDTH)
    else:
        if len(ready) > 0:
            # Values are needed later than factors, which are on their way.
            tiles = arguments[4]
            if tiles[2] < tiles[3]:
                mbarrier.wait(ready[0], 0)
        start_copies(memory[0], arguments, WHICH, SHARED_BY)
    rings, weights, tops, of_slots = memory
    if WHOLE > 0:
        weigh_whole(
            rings, weights, tops, of_slots, out, arguments, WHICH, SHARED_BY,
            KIND[0], KIND[1], KIND[2], KIND[3], KIND[4], KIND[5], KIND[6],
        )  # fmt: skip
    else:
        weigh_values(
            rings, weights, tops, of_slots, out, arguments, WHICH, SHARED_BY,
            KIND[0], KIND[1], KIND[2], KIND[3], KIND[4], KIND[5], KIND[6],
        )  # fmt: skip


@gluon.jit
def attend(
    given, first_head, lead, leading, end_tile, table, table_t,
    MODE: gl.constexpr, SPAN: gl.constexpr, KEY_STAGES: gl.constexpr, STEP: gl.constexpr, VALUE_STAGES: gl.constexpr,
    HELD: gl.constexpr, KV: gl.constexpr, QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, SLOTS: gl.constexpr,
    WIDTH: gl.constexpr, WIDE: gl.constexpr, RANK: gl.constexpr, CHUNKS: gl.constexpr, RANK_STRIDE: gl.constexpr,
    MASK: gl.constexpr, DTYPE: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr, BITS: gl.constexpr,
    VALUE_BITS: gl.constexpr,
    ASYMMETRIC: gl.constexpr, SCORERS: gl.constexpr, WEIGHERS: gl.constexpr, SCORE_REGISTERS: gl.constexpr,
    VALUE_REGISTERS: gl.constexpr, WHOLE: gl.constexpr, SCALED: gl.constexpr, SECTIONS: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_NORM: gl.constexpr,
):  # fmt: skip
    """The part of a row's means that a program of `hopper_kernel` has, of its heads.

    given: what does not depend on the mode, at the row and the heads; of every key group what is its own, as tuples.
    lead, leading, end_tile: of windows, the row of `spans_of`. HELD: as `held_of` finds it.
    """
    (
        at_keys, at_values, parameters, up, at_query, bias, norm, mask, bases, basis, frequencies, means, logarithms,
        key_rank, key_units_there, up_rank, value_rank, value_units_there, length, keys_t, values_t, row_mask, mask_t,
        up_stride, query_stride, rows_heads, scaling, epsilon,
    ) = given  # fmt: skip
    part, parts = gl.program_id(0), gl.num_programs(0)
    stored: gl.constexpr = DTYPE if BITS == 16 else gl.int16
    key_units: gl.constexpr = RANK // SECTIONS // fields_of(BITS)
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
                value_rings = value_rings + (_ring(stored, VALUE_STAGES, STEP, value_units, plane),)
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
    # Each group of warps that weighs values has a part of its own.
    out = part * WEIGHERS * rows_heads + first_head
    to_values = (
        found, scales, full, empty, tiles, at_values, means, logarithms, value_rank, values_t, value_units_there,
    )  # fmt: skip
    KEY_GROUPS: gl.constexpr = len(at_keys)
    OF_VALUES: gl.constexpr = (KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS, RANK_STRIDE, VALUE_BITS)
    if MODE == "absorbed":
        OF_KEYS: gl.constexpr = (BITS, VALUE_BITS, ASYMMETRIC, MASK)
        buffers = (found, scales, full, empty)
        rings = ()
        for _scorer in gl.static_range(SCORERS):
            ring = ()
            for plane in gl.static_range(planes_of(BITS)):
                ring = ring + (_ring(stored, KEY_STAGES, TILE, key_units, plane),)
            rings = rings + (ring,)
        to_scores = (tiles, at_keys[0], parameters, mask, key_units_there[0], keys_t, row_mask, mask_t)
        if WHOLE > 0:
            queries = gl.allocate_shared_memory(
                gl.int8, [2 * WHOLE, RANK], gl.NVMMASharedLayout(min(128, RANK), 8, rank=2)
            )  # fmt: skip
            units = gl.allocate_shared_memory(gl.float32, [2, WHOLE], LINES)
            store_whole_queries(queries, units, at_query, query_stride, key_rank[0], scaling, QUERIES, BITS)
        else:
            queries = gl.allocate_shared_memory(DTYPE, [SLOTS, RANK], swizzled(RANK))
            units = queries
            loaded = load_queries(at_query, query_stride, key_rank[0], 0, SLOTS, RANK, QUERIES, 0, False, BITS)
            queries.store((loaded * scaling).to(DTYPE))
        fence_async_shared()
        synchronize()
        if WEIGHERS == 1:
            gl.warp_specialize([
                (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, SCORERS, OF_KEYS, WHOLE)),
                (_weigh, ((), (), memories[0], out, to_values, 0, WEIGHERS, WIDTH, OF_VALUES, WHOLE)),
            ], [4], [VALUE_REGISTERS])  # fmt: skip
        elif SCORERS == 1:
            gl.warp_specialize([
                (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, SCORERS, OF_KEYS, WHOLE)),
                (_weigh, ((), (), memories[0], out, to_values, 0, WEIGHERS, WIDTH, OF_VALUES, WHOLE)),
                (_weigh, ((), (), memories[1], out + rows_heads, to_values, 1, WEIGHERS, WIDTH, OF_VALUES, WHOLE)),
            ], [4, 4], [VALUE_REGISTERS, VALUE_REGISTERS])  # fmt: skip
        else:
            gl.warp_specialize([
                (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, SCORERS, OF_KEYS, WHOLE)),
                (_score_absorbed, (buffers, rings[1], queries, units, to_scores, 1, SCORERS, OF_KEYS, WHOLE)),
                (_weigh, ((), (), memories[0], out, to_values, 0, WEIGHERS, WIDTH, OF_VALUES, WHOLE)),
                (_weigh, ((), (), memories[1], out + rows_heads, to_values, 1, WEIGHERS, WIDTH, OF_VALUES, WHOLE)),
            ], [4, 4, 4], [SCORE_REGISTERS, VALUE_REGISTERS, VALUE_REGISTERS])  # fmt: skip
    else:
        # Windows take half of the columns of a head, of two heads at a time.
        UNITS: gl.constexpr = (
            KV * WIDE // UNIT if SPAN == 0 else KV + KEY_GROUPS if MODE == "mixed" else (KV + 1) // 2 * 2
        )
        WIDTH_OF_PLACE: gl.constexpr = (
            SLOTS if MODE == "mixed" else LEAST if MODE == "rotated" else 1 if MODE == "folded" and UNITS > KV else 2
        )
        LATENTS: gl.constexpr = RANK // SECTIONS
        factors = gl.allocate_shared_memory(DTYPE, [SECTIONS * UNITS, UNIT, LATENTS], swizzled(LATENTS))
        # Folded queries need no place of their own.
        beside = factors
        if MODE == "rotated":
            biases, weights_of_norm = (), ()
            if HAS_BIAS:
                BIASES: gl.constexpr = bias_columns(UNITS)
                biases = (gl.allocate_shared_memory(DTYPE, [UNIT, BIASES], swizzled(BIASES)),)
            if HAS_NORM:
                some = gl.allocate_shared_memory(gl.float32, [UNITS // KV, UNIT], LINES)
                weights_of_norm = (some,)
            queries = gl.allocate_shared_memory(DTYPE, [UNITS, LEAST, UNIT], swizzled(UNIT))
            beside = (queries, biases, weights_of_norm)
        if MODE == "mixed":
            beside = (
                gl.allocate_shared_memory(DTYPE, [KV, SLOTS, UNIT], swizzled(UNIT)),
                gl.allocate_shared_memory(DTYPE, [HELD * KV * 2, UNIT // 2, LATENTS], swizzled(LATENTS)),
                gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
            )
            mbarrier.init(beside[2], count=1)
        if MODE == "windows":
            # A group's own parts of the factors.
            HALVES: gl.constexpr = own_parts(KV, SECTIONS) * 2 * HELD
            PART: gl.constexpr = RANK // parts_of_latents(KV, SECTIONS)
        rings, places, besides = (), (), ()
        for own in gl.static_range(OWN):
            place = seen_as(
                found[own], BUFFERS * SLOTS // WIDTH_OF_PLACE, TILE, WIDTH_OF_PLACE,
                gl.SwizzledSharedLayout(1, 1, 1, [0, 1]),
            )  # fmt: skip
            places = places + (place,)
        for _which in gl.static_range(2):
            own = ()
            for _group in gl.static_range(KEY_GROUPS):
                ring = ()
                for plane in gl.static_range(planes_of(BITS)):
                    for _section in gl.static_range(SECTIONS):
                        ring = ring + (_ring(stored, KEY_STAGES, TILE, key_units, plane),)
                own = own + (ring,)
            rings = rings + (own,)
            if MODE == "windows":
                held = ()
                for piece in gl.static_range(2):
                    some = gl.allocate_shared_memory(DTYPE, [HALVES, PIECES[piece], PART], swizzled(PART))
                    held = held + (some,)
                turned = gl.allocate_shared_memory(
                    gl.float16, [(KV + 3) // 4 * 2, 2, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
                )  # fmt: skip
                beside = (held, turned)
            besides = besides + (beside,)
        to_scores = (
            tiles, at_keys, parameters, table, mask, up, at_query, bias, norm,
            key_units_there, up_rank, keys_t, table_t, row_mask, mask_t, up_stride, query_stride, scaling, epsilon,
            bases, basis, frequencies, lead + begin * TILE,
        )  # fmt: skip
        synchronize()
        window = ()
        if MODE == "mixed":
            # Nothing is read where there is no tile.
            to_make = (
                (up, up_stride, there_if(begin < end, up_rank)), at_query, query_stride, scaling, bases, frequencies,
                lead + begin * TILE,
            )  # fmt: skip
            window = (factors, beside, to_make)
        gl.warp_specialize([
            (score_rebuilt, (
                places, scales, full, empty, ready, rings[0], factors, besides[0], to_scores, 0,
                MODE, KV, TOGETHER, QUERIES, QUERY_SLOTS, WIDTH, SPAN, DTYPE, BITS, VALUE_BITS, ASYMMETRIC, MASK,
                WHOLE > 0, SCALED,
            )),
            (score_rebuilt, (
                places, scales, full, empty, ready, rings[1], factors, besides[1], to_scores, 1,
                MODE, KV, TOGETHER, QUERIES, QUERY_SLOTS, WIDTH, SPAN, DTYPE, BITS, VALUE_BITS, ASYMMETRIC, MASK,
                WHOLE > 0, SCALED,
            )),
            (_weigh, (
                window, (ready,) if MODE == "rotated" or MODE == "folded" else (), memories[0], out, to_values, 0,
                WEIGHERS, WIDTH, OF_VALUES, WHOLE,
            )),
        ], [4, 4], [SCORE_REGISTERS, VALUE_REGISTERS])  # fmt: skip
