"""Decode attention over latents on Hopper: one launch for scores and values, which half of the warps each compute.

The matrix units of a warp group take both sides from shared memory, so that one group of warps keeps up with what a
multiprocessor can read. Keys are rebuilt whole, with the group's up factor in shared memory all the time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from palu.kernels.decode_attention.hopper.common import TILE, synchronize, visible_tiles
from palu.kernels.decode_attention.hopper.rotated import LEAST
from palu.kernels.decode_attention.hopper.scores import score_absorbed, score_rebuilt
from palu.kernels.decode_attention.hopper.values import CHUNK, weigh_values


@gluon.jit(do_not_specialize=["length", "table_b", "mask_b", "rows_heads"])
def hopper_kernel(
    query, keys, values, up, table, mask, sums, totals, peaks,
    key_rank_of, key_offset_of, value_rank_of, value_offset_of,
    length, keys_b, keys_t, values_b, values_t, up_stride, table_b, table_t, mask_b, mask_t, query_stride,
    rows_heads, scaling,
    MODE: gl.constexpr, GROUPS: gl.constexpr, KV: gl.constexpr, QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr,
    SLOTS: gl.constexpr, QUERY_ROWS: gl.constexpr, WIDTH: gl.constexpr, WIDE: gl.constexpr, RANK: gl.constexpr,
    KEY_STAGES: gl.constexpr, KEY_DIVISOR: gl.constexpr, CHUNKS: gl.constexpr, STEP: gl.constexpr,
    VALUE_STAGES: gl.constexpr, VALUE_DIVISOR: gl.constexpr, RANK_STRIDE: gl.constexpr, MASK: gl.constexpr,
    DTYPE: gl.constexpr, TOGETHER: gl.constexpr,
    COLUMNS: gl.constexpr, VALUE_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Sums of value latents of a group's heads over every part-th tile of tokens, relative to their peaks.

    query: [rows, GROUPS * KV * QUERIES, query_stride]; absorbed, KV is one. table: `lane_table`. sums: float32
    [parts, rows, heads, RANK_STRIDE]; totals, peaks: [parts, rows, heads], as `combine_kernel` takes them.
    """
    part, group, row = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    parts = gl.num_programs(0)
    at_row = row // QUERY_ROWS
    dtype: gl.constexpr = DTYPE
    rank = gl.multiple_of(gl.load(key_rank_of + group), KEY_DIVISOR)
    value_rank = gl.multiple_of(gl.load(value_rank_of + group), VALUE_DIVISOR)
    key_offset = gl.multiple_of(gl.load(key_offset_of + group), KEY_DIVISOR)
    value_offset = gl.multiple_of(gl.load(value_offset_of + group), VALUE_DIVISOR)
    at_keys = keys + at_row.to(gl.int64) * keys_b + key_offset
    at_values = values + at_row.to(gl.int64) * values_b + value_offset
    first_head = (row * GROUPS + group) * (KV * QUERIES)
    at_query = query + first_head * query_stride
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128 if RANK >= 64 else 2 * RANK, 16, rank=2)
    key_ring = gl.allocate_shared_memory(dtype, [KEY_STAGES, TILE, RANK], swizzled)
    # A buffer for each chunk, so that the compiler sees that copies do not overlap.
    value_rings = ()
    for _ in gl.static_range(CHUNKS):
        ring = gl.allocate_shared_memory(dtype, [VALUE_STAGES, STEP, CHUNK], gl.NVMMASharedLayout(128, 16, rank=2))
        value_rings = value_rings + (ring,)
    weights = gl.allocate_shared_memory(dtype, [TILE // STEP, SLOTS, STEP], gl.NVMMASharedLayout(2 * STEP, 16, rank=2))
    found = gl.allocate_shared_memory(gl.float32, [2, TILE, SLOTS], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=1)
    # The program's tiles: every parts-th one, so that all have as many visible ones.
    count = gl.maximum(0, gl.cdiv(gl.cdiv(length, TILE) - part, parts))
    begin, end = visible_tiles(mask, row * mask_b, mask_t, part, parts, count, length, MASK)
    out = part * rows_heads + first_head
    if MODE == "absorbed":
        queries = gl.allocate_shared_memory(dtype, [SLOTS, RANK], swizzled)
        synchronize()
        gl.warp_specialize([
            (score_absorbed, (
                found, full, empty, key_ring, queries, at_keys, mask, at_query,
                part, parts, begin, end, length, rank, keys_t, row * mask_b, mask_t, query_stride, scaling,
                QUERIES, KEY_STAGES, MASK,
            )),
            (weigh_values, (
                found, full, empty, value_rings, weights, at_values, sums, totals, peaks,
                part, parts, begin, end, length, value_rank, values_t, out,
                KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS, VALUE_STAGES, RANK_STRIDE,
            )),
        ], [4], [VALUE_REGISTERS])  # fmt: skip
    else:
        factors = gl.allocate_shared_memory(dtype, [KV, WIDE, RANK], swizzled)
        at_table = table + gl.multiple_of(at_row.to(gl.int64) * table_b, 8)
        # Folded queries need no place of their own.
        queries = factors
        if MODE == "rotated":
            queries = gl.allocate_shared_memory(dtype, [KV, LEAST, WIDE], gl.NVMMASharedLayout(128, 16, rank=2))
        synchronize()
        gl.warp_specialize([
            (score_rebuilt, (
                found, full, empty, key_ring, factors, queries, at_keys, at_table, mask, up + key_offset, at_query,
                part, parts, begin, end, length, rank, keys_t, table_t, row * mask_b, mask_t, up_stride, query_stride,
                scaling,
                MODE == "folded", TOGETHER, QUERIES, QUERY_SLOTS, WIDTH, KEY_STAGES, MASK,
            )),
            (weigh_values, (
                found, full, empty, value_rings, weights, at_values, sums, totals, peaks,
                part, parts, begin, end, length, value_rank, values_t, out,
                KV, QUERIES, QUERY_SLOTS, TOGETHER, COLUMNS, VALUE_STAGES, RANK_STRIDE,
            )),
        ], [4], [VALUE_REGISTERS])  # fmt: skip
