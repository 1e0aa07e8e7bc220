"""Decode attention over latents on Hopper: one launch in which groups of four warps score or weigh values.

The matrix units take the up factor from shared memory, where it stays, and key latents from registers, where codes
become numbers. Keys are rebuilt whole, or partly interpolated in windows of positions (`windows`, `slow`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from palu.kernels.decode_attention.hopper.absorbed import score_absorbed, score_absorbed_codes, store_whole_queries
from palu.kernels.decode_attention.hopper.common import (
    TILE,
    WARPS,
    allow_launch_after,
    place_of,
    seen_as,
    synchronize,
    visible_tiles,
    wait_for_launch_before,
)
from palu.kernels.decode_attention.hopper.operands import swizzled
from palu.kernels.decode_attention.hopper.prologue import bias_columns, load_queries
from palu.kernels.decode_attention.hopper.scores import score_rebuilt
from palu.kernels.decode_attention.hopper.turns import LEAST, UNIT
from palu.kernels.decode_attention.hopper.values import CHUNK, weigh_values
from palu.kernels.decode_attention.hopper.whole import weigh_whole
from palu.kernels.decode_attention.hopper.windows import PIECES
from palu.kernels.latent_scores.tiles import GAPS


@gluon.jit
def _score_absorbed(
    buffers, ring, queries, units, arguments, WHICH: gl.constexpr, SHARED_BY: gl.constexpr, KIND: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Score latents; KIND: what both take last, in their order; WHOLE: as in `_weigh`."""
    found, scales, full, empty = buffers
    if WHOLE > 0:
        score_absorbed_codes(
            found, scales, full, empty, ring, queries, units, arguments, WHICH, SHARED_BY, KIND[0], KIND[1], KIND[2]
        )  # fmt: skip
    else:
        score_absorbed(found, scales, full, empty, ring, queries, arguments, KIND[0], KIND[1], KIND[2])


@gluon.jit
def _weigh(
    memory, out, arguments, WHICH: gl.constexpr, SHARED_BY: gl.constexpr, KIND: gl.constexpr, WHOLE: gl.constexpr
):  # fmt: skip
    """Weigh values; KIND: what both take last, in their order; WHOLE: slots of weights that are whole numbers, or 0."""
    rings, weights, tops = memory
    if WHOLE > 0:
        weigh_whole(
            rings, weights, tops, out, arguments, WHICH, SHARED_BY,
            KIND[0], KIND[1], KIND[2], KIND[3], KIND[4], KIND[5], KIND[6],
        )  # fmt: skip
    else:
        weigh_values(
            rings, weights, tops, out, arguments, WHICH, SHARED_BY,
            KIND[0], KIND[1], KIND[2], KIND[3], KIND[4], KIND[5], KIND[6],
        )  # fmt: skip


@gluon.jit(do_not_specialize=["length", "table_b", "mask_b", "spans_b", "rows_heads"])
def hopper_kernel(
    query, keys, values, up, bias, norm, table, mask, key_parameters, value_parameters, spans, bases, basis,
    frequencies, sums, totals, peaks,
    key_rank_of, key_offset_of, value_rank_of, value_offset_of,
    length, keys_b, keys_t, values_b, values_t, key_parameters_b, key_parameters_t, value_parameters_b,
    value_parameters_t, up_stride, table_b, table_t, mask_b, mask_t, spans_b, query_stride, rows_heads, scaling,
    epsilon,
    MODE: gl.constexpr, TAKES: gl.constexpr, SPAN: gl.constexpr, GROUPS: gl.constexpr, KV: gl.constexpr,
    QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, SLOTS: gl.constexpr, QUERY_ROWS: gl.constexpr,
    WIDTH: gl.constexpr, WIDE: gl.constexpr, RANK: gl.constexpr, KEY_STAGES: gl.constexpr, KEY_DIVISOR: gl.constexpr,
    CHUNKS: gl.constexpr, STEP: gl.constexpr, VALUE_STAGES: gl.constexpr, VALUE_DIVISOR: gl.constexpr,
    RANK_STRIDE: gl.constexpr, MASK: gl.constexpr, DTYPE: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr,
    BITS: gl.constexpr, ASYMMETRIC: gl.constexpr, SCORERS: gl.constexpr, WEIGHERS: gl.constexpr,
    SCORE_REGISTERS: gl.constexpr, VALUE_REGISTERS: gl.constexpr, WHOLE: gl.constexpr, HELD: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_NORM: gl.constexpr, EVEN_KEYS: gl.constexpr, EVEN_VALUES: gl.constexpr,
):  # fmt: skip
    """Sums of value latents of a group's heads over a part of the tokens, relative to their peaks.

    query: [rows, GROUPS * KV * QUERIES, query_stride]; absorbed, KV is one. keys, values: of codes, bytes. up: of codes
    in the order of `unit_order`. bias: of all keys; norm: a key norm's weights, epsilon what it adds to mean squares.
    table: `lane_table`, of "mixed" and "windows" that of the fast pairs. parameters: of codes, scales of every group,
    with their zero points behind them if ASYMMETRIC. spans: `spans_of`; TAKES: rows without gaps ("gapless"), the
    others ("gaps"), or "all"; of other rows nothing is written. SPAN: tokens of a window, or 0; bases, basis: of
    `palu.kernels.rotation.Window`, of "windows" by lane. sums: float32 [parts, rows, heads, RANK_STRIDE]; totals,
    peaks: [parts, rows, heads], as `combine_kernel` takes them: WEIGHERS parts of every program.
    """
    if TAKES != "gapless":
        # Where there is a launch for gaps before, that one has waited.
        wait_for_launch_before()
    part, group, row = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    parts = gl.num_programs(0)
    at_row = (row // QUERY_ROWS).to(gl.int64)
    key_rank, key_offset = place_of(key_rank_of, key_offset_of, group, EVEN_KEYS, KEY_DIVISOR)
    value_rank, value_offset = place_of(value_rank_of, value_offset_of, group, EVEN_VALUES, VALUE_DIVISOR)
    at_keys, at_values = keys + at_row * keys_b, values + at_row * values_b
    if BITS < 16:
        PARAMETERS: gl.constexpr = 2 if ASYMMETRIC else 1
        key_parameters += at_row * key_parameters_b + group * PARAMETERS
        value_parameters += at_row * value_parameters_b + group * PARAMETERS
        # Codes are copied and read in units of 16 bits.
        at_keys = at_keys.to(gl.pointer_type(gl.int16), bitcast=True)
        at_values = at_values.to(gl.pointer_type(gl.int16), bitcast=True)
        keys_t, values_t = keys_t // 2, values_t // 2
    parameters = (key_parameters, value_parameters, key_parameters_t, value_parameters_t)
    at_keys += gl.multiple_of(key_offset * BITS // 16, 8)
    at_values += gl.multiple_of(value_offset * BITS // 16, 8)
    first_head = (row * GROUPS + group) * (KV * QUERIES)
    at_query = query + first_head * query_stride
    stored: gl.constexpr = DTYPE if BITS == 16 else gl.int16
    key_units: gl.constexpr = RANK * BITS // 16
    value_units: gl.constexpr = CHUNK * BITS // 16
    # A buffer for each chunk, so that the compiler sees that copies do not overlap.
    memories = ()
    for _weigher in gl.static_range(WEIGHERS):
        value_rings = ()
        for _chunk in gl.static_range(CHUNKS):
            ring = gl.allocate_shared_memory(stored, [VALUE_STAGES, STEP, value_units], swizzled(value_units))
            value_rings = value_rings + (ring,)
        if WHOLE > 0:
            weights = gl.allocate_shared_memory(
                gl.int8, [4 // WEIGHERS * TILE // STEP, 2 * WHOLE, STEP], gl.NVMMASharedLayout(STEP, 8, rank=2)
            )
            tops = gl.allocate_shared_memory(gl.float32, [2, WHOLE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        else:
            # Of codes, of two tiles.
            weights = gl.allocate_shared_memory(
                DTYPE, [(2 // WEIGHERS if BITS < 16 else 1) * TILE // STEP, SLOTS, STEP], swizzled(STEP)
            )
            tops = gl.allocate_shared_memory(gl.int32, [WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        memories = memories + ((value_rings, weights, tops),)
    found = gl.allocate_shared_memory(gl.float32, [2, TILE, SLOTS], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    # Of a tile's values: one over the scale, the shift; finite ones before there is a tile.
    scales = gl.allocate_shared_memory(gl.float32, [8, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for at in gl.static_range(8 if BITS < 16 else 0):
        scales.index(at).store(gl.zeros([TILE], gl.float32, gl.BlockedLayout([1], [32], [WARPS], [0])))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=1)
    mbarrier.init(ready, count=2)
    at_span = spans + row * spans_b
    lead, ours = 0, True
    if TAKES != "all":
        lead = gl.load(at_span)
        if TAKES == "gaps":
            allow_launch_after()
            if lead != GAPS:
                return
        ours = (lead != GAPS) == (TAKES == "gapless")
    if SPAN > 0:
        # The program's tiles: neighbours, of those with visible tokens.
        leading = gl.load(at_span + 1)
        many = gl.where(ours, gl.load(at_span + 2) - leading, 0)
        begin, end = leading + many * part // parts, leading + many * (part + 1) // parts
        tiles = (0, 1, begin, end, length)
    else:
        # The program's tiles: every parts-th one, so that all have as many visible ones.
        count = gl.where(ours, gl.maximum(0, gl.cdiv(gl.cdiv(length, TILE) - part, parts)), 0)
        begin, end = visible_tiles(mask, row * mask_b, mask_t, part, parts, count, length, MASK)
        tiles = (part, parts, begin, end, length)
    # Each group of warps that weighs values has a part of the sums of its own.
    out = part * WEIGHERS * rows_heads + first_head
    to_values = (found, scales, full, empty, tiles, at_values, sums, totals, peaks, value_rank, values_t, ours)
    key_units_there = gl.multiple_of(key_rank * BITS // 16, 8)
    OF_VALUES: gl.constexpr = (KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS, RANK_STRIDE, BITS)
    if MODE == "absorbed":
        OF_KEYS: gl.constexpr = (BITS, ASYMMETRIC, MASK)
        buffers = (found, scales, full, empty)
        rings = ()
        for _scorer in gl.static_range(SCORERS):
            ring = gl.allocate_shared_memory(stored, [KEY_STAGES, TILE, key_units], swizzled(key_units))
            rings = rings + (ring,)
        to_scores = (tiles, at_keys, parameters, mask, key_units_there, keys_t, row * mask_b, mask_t)
        if WHOLE > 0:
            queries = gl.allocate_shared_memory(
                gl.int8, [2 * WHOLE, RANK], gl.NVMMASharedLayout(min(128, RANK), 8, rank=2)
            )  # fmt: skip
            units = gl.allocate_shared_memory(gl.float32, [2, WHOLE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            store_whole_queries(queries, units, at_query, query_stride, key_rank, scaling, QUERIES, BITS)
        else:
            queries = gl.allocate_shared_memory(DTYPE, [SLOTS, RANK], swizzled(RANK))
            units = queries
            loaded = load_queries(at_query, query_stride, key_rank, 0, SLOTS, RANK, QUERIES, 0, False, BITS)
            queries.store((loaded * scaling).to(DTYPE))
        fence_async_shared()
        synchronize()
        if WEIGHERS == 1:
            gl.warp_specialize([
                (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, SCORERS, OF_KEYS, WHOLE)),
                (_weigh, (memories[0], out, to_values, 0, WEIGHERS, OF_VALUES, WHOLE)),
            ], [4], [VALUE_REGISTERS])  # fmt: skip
        elif SCORERS == 1:
            gl.warp_specialize([
                (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, SCORERS, OF_KEYS, WHOLE)),
                (_weigh, (memories[0], out, to_values, 0, WEIGHERS, OF_VALUES, WHOLE)),
                (_weigh, (memories[1], out + rows_heads, to_values, 1, WEIGHERS, OF_VALUES, WHOLE)),
            ], [4, 4], [VALUE_REGISTERS, VALUE_REGISTERS])  # fmt: skip
        else:
            gl.warp_specialize([
                (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, SCORERS, OF_KEYS, WHOLE)),
                (_score_absorbed, (buffers, rings[1], queries, units, to_scores, 1, SCORERS, OF_KEYS, WHOLE)),
                (_weigh, (memories[0], out, to_values, 0, WEIGHERS, OF_VALUES, WHOLE)),
                (_weigh, (memories[1], out + rows_heads, to_values, 1, WEIGHERS, OF_VALUES, WHOLE)),
            ], [4, 4, 4], [SCORE_REGISTERS, VALUE_REGISTERS, VALUE_REGISTERS])  # fmt: skip
    else:
        # Factors for codes are in the codes' order, every group as wide as the others.
        up_offset, up_rank = key_offset, key_rank
        if BITS < 16:
            up_offset, up_rank = group * RANK, RANK
        # Windows take half of the columns of a head, of two heads at a time.
        UNITS: gl.constexpr = KV * WIDE // UNIT if SPAN == 0 else KV + 1 if MODE == "mixed" else (KV + 1) // 2 * 2
        WIDTH_OF_PLACE: gl.constexpr = (
            SLOTS if MODE == "mixed" else LEAST if MODE == "rotated" else 1 if MODE == "folded" and UNITS > KV else 2
        )
        factors = gl.allocate_shared_memory(DTYPE, [UNITS, UNIT, RANK], swizzled(RANK))
        at_table = table + gl.multiple_of(at_row * table_b, 8)
        # Folded queries need no place of their own.
        beside = factors
        if MODE == "rotated":
            biases, weights_of_norm = (), ()
            if HAS_BIAS:
                BIASES: gl.constexpr = bias_columns(UNITS)
                biases = (gl.allocate_shared_memory(DTYPE, [UNIT, BIASES], swizzled(BIASES)),)
            if HAS_NORM:
                some = gl.allocate_shared_memory(gl.float32, [UNITS // KV, UNIT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
                weights_of_norm = (some,)
            queries = gl.allocate_shared_memory(DTYPE, [UNITS, LEAST, UNIT], swizzled(UNIT))
            beside = (queries, biases, weights_of_norm)
        if MODE == "mixed":
            beside = (
                gl.allocate_shared_memory(DTYPE, [KV, SLOTS, UNIT], swizzled(UNIT)),
                gl.allocate_shared_memory(DTYPE, [KV * 2, UNIT // 2, RANK], swizzled(RANK)),
            )
        rings, places, besides = (), (), ()
        for which in gl.static_range(2):
            ring = gl.allocate_shared_memory(stored, [KEY_STAGES, TILE, key_units], swizzled(key_units))
            rings = rings + (ring,)
            place = seen_as(
                found.index(which), SLOTS // WIDTH_OF_PLACE, TILE, WIDTH_OF_PLACE,
                gl.SwizzledSharedLayout(1, 1, 1, [0, 1]),
            )  # fmt: skip
            places = places + (place,)
            if MODE == "windows":
                held = ()
                for piece in gl.static_range(2):
                    some = gl.allocate_shared_memory(DTYPE, [2 * HELD, PIECES[piece], RANK], swizzled(RANK))
                    held = held + (some,)
                turned = gl.allocate_shared_memory(
                    gl.float16, [(KV + 3) // 4 * 2, 2, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
                )  # fmt: skip
                beside = (held, turned)
            besides = besides + (beside,)
        to_scores = (
            tiles, at_keys, parameters, at_table, mask, up + up_offset, at_query, bias + group * (KV * WIDTH), norm,
            key_units_there, up_rank, keys_t, table_t, row * mask_b, mask_t, up_stride, query_stride, scaling, epsilon,
            bases, basis, frequencies, lead + begin * TILE,
        )  # fmt: skip
        synchronize()
        gl.warp_specialize([
            (score_rebuilt, (
                places[0], scales, full.index(0), empty.index(0), ready, rings[0], factors, besides[0], to_scores,
                0, MODE, KV, TOGETHER, QUERIES, QUERY_SLOTS, WIDTH, SPAN, DTYPE, BITS, ASYMMETRIC, MASK, WHOLE > 0,
            )),
            (score_rebuilt, (
                places[1], scales, full.index(1), empty.index(1), ready, rings[1], factors, besides[1], to_scores,
                1, MODE, KV, TOGETHER, QUERIES, QUERY_SLOTS, WIDTH, SPAN, DTYPE, BITS, ASYMMETRIC, MASK, WHOLE > 0,
            )),
            (_weigh, (memories[0], out, to_values, 0, WEIGHERS, OF_VALUES, WHOLE)),
        ], [4, 4], [SCORE_REGISTERS, VALUE_REGISTERS])  # fmt: skip
    if TAKES == "gapless":
        # The launch before took the other rows, and the one after waits for this one only.
        wait_for_launch_before()
