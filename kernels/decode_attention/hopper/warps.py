"""What a program's groups of four warps do, through the shared memory between them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from palu.kernels.decode_attention.hopper.absorbed import score_absorbed, score_absorbed_codes, store_whole_queries
from palu.kernels.decode_attention.hopper.common import TILE, seen_as, synchronize
from palu.kernels.decode_attention.hopper.fields import fields_of, planes_of
from palu.kernels.decode_attention.hopper.operands import swizzled
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
# Registers of a thread that a group of warps has at least.
LEAST_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit
def ring_of(stored: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr, PLANE: gl.constexpr):
    """Shared memory [stages, rows, units] for what is stored, or for the bytes of a second plane."""
    if PLANE == 0:
        ring = gl.allocate_shared_memory(stored, [STAGES, ROWS, UNITS], swizzled(UNITS))
    else:
        ring = gl.allocate_shared_memory(gl.uint8, [STAGES, ROWS, UNITS], BYTES)
    return ring


@gluon.jit
def _score_absorbed(buffers, ring, queries, units, arguments, WHICH: gl.constexpr, OF: gl.constexpr):
    """Score latents. OF: as of `attend`."""
    found, scales, full, empty = buffers
    MASK: gl.constexpr = OF.mask
    if OF.whole > 0:
        score_absorbed_codes(
            found, scales, full, empty, ring, queries, units, arguments, WHICH, OF.scorers, OF.bits, OF.value_bits,
            OF.asymmetric, MASK,
        )  # fmt: skip
    else:
        score_absorbed(
            found, scales, full, empty, ring, queries, arguments, OF.bits, OF.value_bits, OF.asymmetric, MASK
        )  # fmt: skip


@gluon.jit
def _weigh(window, ready, memory, out, arguments, WHICH: gl.constexpr, OF: gl.constexpr):
    """Weigh values. OF: as of `attend`.

    window: what `make_first_window` takes first, where this group of warps makes it, or (). ready: a barrier that both
    groups that score arrive at once, if there is a tile, when what tiles are multiplied with is there, or ().
    """
    if len(window) > 0:
        HEADS: gl.constexpr = (OF.kv, OF.queries, OF.query_slots, OF.together)
        make_first_window(window[0], window[1], memory[0], window[2], arguments, HEADS, OF.width)
    else:
        if len(ready) > 0:
            # Values are needed later than factors, which are on their way.
            tiles = arguments[4]
            if tiles[2] < tiles[3]:
                mbarrier.wait(ready[0], 0)
        start_copies(memory[0], arguments, WHICH, OF.weighers)
    rings, weights, tops, of_slots = memory
    if OF.whole > 0:
        weigh_whole(
            rings, weights, tops, of_slots, out, arguments, WHICH, OF.weighers, OF.kv, OF.queries, OF.query_slots,
            OF.together, OF.columns, OF.rank_stride, OF.value_bits,
        )  # fmt: skip
    else:
        weigh_values(
            rings, weights, tops, of_slots, out, arguments, WHICH, OF.weighers, OF.kv, OF.queries, OF.query_slots,
            OF.together, OF.columns, OF.rank_stride, OF.value_bits,
        )  # fmt: skip


@gluon.jit
def _idle():
    """What a group of warps does that only programs of other stretches need: the compiler's own fill takes too few."""


@gluon.jit
def _key_ring(OF: gl.constexpr, PLAN: gl.constexpr):
    """A ring of tiles' key latents, of every section of every plane, a tuple."""
    BITS: gl.constexpr = OF.bits
    SECTIONS: gl.constexpr = OF.sections
    STAGES: gl.constexpr = PLAN.key_stages
    UNITS: gl.constexpr = OF.rank // OF.sections // fields_of(BITS)
    stored: gl.constexpr = OF.dtype if BITS == 16 else gl.int16
    ring = ()
    for plane in gl.static_range(planes_of(BITS)):
        for _section in gl.static_range(SECTIONS):
            ring = ring + (ring_of(stored, STAGES, TILE, UNITS, plane),)
    return ring


@gluon.jit
def attend_absorbed(
    memory, tiles, tokens, keys, queries, to_values, rows_heads, out, OF: gl.constexpr, PLAN: gl.constexpr
):  # fmt: skip
    """Latents are scored as they are. Arguments: as `attend` has them; memory: shared by groups of warps."""
    at_keys, parameters, key_units_there, keys_t = keys
    at_query, query_stride, scaling, key_rank = queries
    _, mask, row_mask, mask_t = tokens
    found, full, empty, scales, _, memories = memory
    SLOTS: gl.constexpr = OF.slots
    RANK: gl.constexpr = OF.rank
    DTYPE: gl.constexpr = OF.dtype
    SCORERS: gl.constexpr = OF.scorers
    WEIGHERS: gl.constexpr = OF.weighers
    VALUE_REGISTERS: gl.constexpr = OF.value_registers
    WHOLE: gl.constexpr = OF.whole
    buffers = (found, scales, full, empty)
    rings = ()
    for _scorer in gl.static_range(SCORERS):
        rings = rings + (_key_ring(OF, PLAN),)
    to_scores = (tiles, at_keys[0], parameters, mask, key_units_there[0], keys_t, row_mask, mask_t)
    if WHOLE > 0:
        queries = gl.allocate_shared_memory(
            gl.int8, [2 * WHOLE, RANK], gl.NVMMASharedLayout(min(128, RANK), 8, rank=2)
        )  # fmt: skip
        units = gl.allocate_shared_memory(gl.float32, [2, WHOLE], LINES)
        store_whole_queries(queries, units, at_query, query_stride, key_rank[0], scaling, OF.queries, OF.bits)
    else:
        queries = gl.allocate_shared_memory(DTYPE, [SLOTS, RANK], swizzled(RANK))
        units = queries
        loaded = load_queries(at_query, query_stride, key_rank[0], 0, SLOTS, RANK, OF.queries, 0, False, OF.bits)
        queries.store((loaded * scaling).to(DTYPE))
    fence_async_shared()
    synchronize()
    if WEIGHERS == 1 and OF.idle == 0:
        gl.warp_specialize([
            (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, OF)),
            (_weigh, ((), (), memories[0], out, to_values, 0, OF)),
        ], [4], [VALUE_REGISTERS])  # fmt: skip
    elif WEIGHERS == 1 and OF.idle == 1:
        gl.warp_specialize([
            (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, OF)),
            (_weigh, ((), (), memories[0], out, to_values, 0, OF)),
            (_idle, ()),
        ], [4, 4], [VALUE_REGISTERS, LEAST_REGISTERS])  # fmt: skip
    elif WEIGHERS == 1:
        gl.warp_specialize([
            (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, OF)),
            (_weigh, ((), (), memories[0], out, to_values, 0, OF)),
            (_idle, ()), (_idle, ()),
        ], [4, 4, 4], [VALUE_REGISTERS, LEAST_REGISTERS, LEAST_REGISTERS])  # fmt: skip
    elif SCORERS == 1:
        gl.warp_specialize([
            (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, OF)),
            (_weigh, ((), (), memories[0], out, to_values, 0, OF)),
            (_weigh, ((), (), memories[1], out + rows_heads, to_values, 1, OF)),
        ], [4, 4], [VALUE_REGISTERS, VALUE_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_score_absorbed, (buffers, rings[0], queries, units, to_scores, 0, OF)),
            (_score_absorbed, (buffers, rings[1], queries, units, to_scores, 1, OF)),
            (_weigh, ((), (), memories[0], out, to_values, 0, OF)),
            (_weigh, ((), (), memories[1], out + rows_heads, to_values, 1, OF)),
        ], [4, 4, 4], [OF.score_registers, VALUE_REGISTERS, VALUE_REGISTERS])  # fmt: skip


@gluon.jit
def attend_rebuilt(
    memory, tiles, tokens, keys, queries, factor, basis, table, to_values, out, OF: gl.constexpr, PLAN: gl.constexpr
):  # fmt: skip
    """Keys are rebuilt, or in part interpolated in windows of positions.

    Arguments: as `attend` has them; memory: shared by groups of warps; table: with a token's step and the position of
    the first window.
    """
    at_keys, parameters, key_units_there, keys_t = keys
    at_query, query_stride, scaling, _ = queries
    up, up_rank, up_stride, bias, norm, epsilon = factor
    bases, basis, frequencies = basis
    table, table_t, position = table
    _, mask, row_mask, mask_t = tokens
    found, full, empty, scales, ready, memories = memory
    MODE: gl.constexpr = PLAN.mode
    SPAN: gl.constexpr = PLAN.span
    HELD: gl.constexpr = PLAN.held
    KV: gl.constexpr = OF.kv
    SLOTS: gl.constexpr = OF.slots
    RANK: gl.constexpr = OF.rank
    DTYPE: gl.constexpr = OF.dtype
    SECTIONS: gl.constexpr = OF.sections
    GROUPS: gl.constexpr = len(at_keys)
    # Windows take half of the columns of a head, of two heads at a time.
    UNITS: gl.constexpr = KV * OF.wide // UNIT if SPAN == 0 else KV + GROUPS if MODE == "mixed" else (KV + 1) // 2 * 2
    WIDTH_OF_PLACE: gl.constexpr = (
        SLOTS if MODE == "mixed" else LEAST if MODE == "rotated" else 1 if MODE == "folded" and UNITS > KV else 2
    )
    LATENTS: gl.constexpr = RANK // SECTIONS
    factors = gl.allocate_shared_memory(DTYPE, [SECTIONS * UNITS, UNIT, LATENTS], swizzled(LATENTS))
    # Folded queries need no place of their own.
    beside = factors
    if MODE == "rotated":
        biases, weights_of_norm = (), ()
        if OF.has_bias:
            BIASES: gl.constexpr = bias_columns(UNITS)
            biases = (gl.allocate_shared_memory(DTYPE, [UNIT, BIASES], swizzled(BIASES)),)
        if OF.has_norm:
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
    for own in gl.static_range(len(found)):
        place = seen_as(
            found[own], found[0].shape[0] * SLOTS // WIDTH_OF_PLACE, TILE, WIDTH_OF_PLACE,
            gl.SwizzledSharedLayout(1, 1, 1, [0, 1]),
        )  # fmt: skip
        places = places + (place,)
    for _which in gl.static_range(2):
        own = ()
        for _group in gl.static_range(GROUPS):
            own = own + (_key_ring(OF, PLAN),)
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
        bases, basis, frequencies, position,
    )  # fmt: skip
    synchronize()
    window = ()
    if MODE == "mixed":
        # Nothing is read where there is no tile.
        there = there_if(tiles[2] < tiles[3], up_rank)
        to_make = ((up, up_stride, there), at_query, query_stride, scaling, bases, frequencies, position)
        window = (factors, beside, to_make)
    gl.warp_specialize([
        (score_rebuilt, (
            places, scales, full, empty, ready, rings[0], factors, besides[0], to_scores, 0, OF, PLAN,
        )),
        (score_rebuilt, (
            places, scales, full, empty, ready, rings[1], factors, besides[1], to_scores, 1, OF, PLAN,
        )),
        (_weigh, (
            window, (ready,) if MODE == "rotated" or MODE == "folded" else (), memories[0], out, to_values, 0,
            OF,
        )),
    ], [4, 4], [OF.score_registers, OF.value_registers])  # fmt: skip
