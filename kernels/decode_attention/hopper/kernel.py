"""Decode attention over latents on Hopper: one launch for scores and values, which half of the warps each compute.

The matrix units of a warp group take both sides from shared memory, so that one group of warps keeps up with what a
multiprocessor can read. Keys are rebuilt whole, with the group's up factor in shared memory all the time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from palu.kernels.decode_attention.hopper.common import TILE, WARPS, copied_layout, synchronize, visible_tiles
from palu.kernels.decode_attention.hopper.scores import LEAST, score_absorbed, score_rotated
from palu.kernels.decode_attention.hopper.values import CHUNK, value_partition


@gluon.jit
def _copy_factor(to, up, up_stride, rank, HEAD_DIM: gl.constexpr):
    """Start copying a kv head's rows of the up factor, both of a pair side by side, zero where there are none."""
    layout: gl.constexpr = copied_layout(to.shape[1])
    row = gl.arange(0, to.shape[0], gl.SliceLayout(1, layout))
    latent = gl.arange(0, to.shape[1], gl.SliceLayout(0, layout))
    at = up + ((row // 2 + row % 2 * (HEAD_DIM // 2)) * up_stride)[:, None] + latent[None, :]
    async_copy.async_copy_global_to_shared(to, at, mask=(row < HEAD_DIM)[:, None] & (latent < rank)[None, :])


@gluon.jit
def _store_query(
    to, query, head_step, width, first_slot, scaling,
    QUERIES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Queries of a kv head to slots first_slot .. of shared memory [slots, columns], the others zero."""
    columns: gl.constexpr = to.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    wanted = gl.arange(0, to.shape[0], gl.SliceLayout(1, layout)) - first_slot
    column = gl.arange(0, columns, gl.SliceLayout(0, layout))
    dim = column // 2 + column % 2 * (width // 2) if PAIRED else column
    ok = ((wanted >= 0) & (wanted < QUERIES))[:, None] & (column < width)[None, :]
    numbers = gl.load(query + (wanted * head_step)[:, None] + dim[None, :], mask=ok, other=0.0).to(gl.float32)
    to.store((numbers * scaling).to(to.dtype))


@gluon.jit(do_not_specialize=["length", "table_b", "mask_b", "rows_heads"])
def hopper_kernel(
    query, keys, values, up, table, mask, sums, totals, peaks,
    key_rank_of, key_offset_of, value_rank_of, value_offset_of,
    length, keys_b, keys_t, values_b, values_t, up_stride, table_b, table_t, mask_b, mask_t, query_stride,
    rows_heads, scaling,
    ABSORBED: gl.constexpr, GROUPS: gl.constexpr, KV: gl.constexpr, QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr,
    SLOTS: gl.constexpr, QUERY_ROWS: gl.constexpr, WIDTH: gl.constexpr, WIDE: gl.constexpr, RANK: gl.constexpr,
    KEY_STAGES: gl.constexpr, KEY_DIVISOR: gl.constexpr, CHUNKS: gl.constexpr, STEP: gl.constexpr,
    VALUE_STAGES: gl.constexpr, VALUE_DIVISOR: gl.constexpr, RANK_STRIDE: gl.constexpr, MASK: gl.constexpr,
    DTYPE: gl.constexpr, VALUE_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Sums of value latents of a group's heads over every part-th tile of tokens, relative to their peaks.

    query: [rows, GROUPS * KV * QUERIES, query_stride]; absorbed, KV is one. table: `Rotation.lane_table`. sums: float32
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
    weights = gl.allocate_shared_memory(dtype, [2, SLOTS, STEP], gl.NVMMASharedLayout(2 * STEP, 16, rank=2))
    found = gl.allocate_shared_memory(gl.float32, [2, TILE, SLOTS], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=1)
    if ABSORBED:
        queries = gl.allocate_shared_memory(dtype, [SLOTS, RANK], swizzled)
        _store_query(queries, at_query, query_stride, rank, 0, scaling, QUERIES, False)
    else:
        factors = gl.allocate_shared_memory(dtype, [KV, WIDE, RANK], swizzled)
        for head in gl.static_range(KV):
            at_up = up + head * WIDTH * up_stride + key_offset
            _copy_factor(factors.index(head), at_up, up_stride, rank, WIDTH)
        TOGETHER: gl.constexpr = LEAST // QUERY_SLOTS if LEAST // QUERY_SLOTS < KV else KV
        paired: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        queries = gl.allocate_shared_memory(dtype, [KV, LEAST, WIDE], paired)
        for head in gl.static_range(KV):
            at_head = at_query + head * QUERIES * query_stride
            _store_query(
                queries.index(head), at_head, query_stride, WIDTH, head % TOGETHER * QUERY_SLOTS, scaling, QUERIES, True
            )  # fmt: skip
    # The program's tiles: every parts-th one, so that all have as many visible ones.
    count = gl.maximum(0, gl.cdiv(gl.cdiv(length, TILE) - part, parts))
    begin, end = visible_tiles(mask, row * mask_b, mask_t, part, parts, count, length, MASK)
    fence_async_shared()
    synchronize()
    out = part * rows_heads + first_head
    if ABSORBED:
        gl.warp_specialize([
            (score_absorbed, (
                found, full, empty, key_ring, queries, at_keys, mask,
                part, parts, begin, end, length, rank, keys_t, row * mask_b, mask_t, KEY_STAGES, MASK,
            )),
            (value_partition, (
                found, full, empty, value_rings, weights, at_values, sums, totals, peaks,
                part, parts, begin, end, length, value_rank, values_t, out,
                KV, QUERIES, QUERY_SLOTS, VALUE_STAGES, RANK_STRIDE,
            )),
        ], [4], [VALUE_REGISTERS])  # fmt: skip
    else:
        at_table = table + gl.multiple_of(at_row * table_b, 8)
        gl.warp_specialize([
            (score_rotated, (
                found, full, empty, key_ring, factors, queries, at_keys, at_table, mask,
                part, parts, begin, end, length, rank, keys_t, table_t, row * mask_b, mask_t,
                KV, TOGETHER, KEY_STAGES, MASK,
            )),
            (value_partition, (
                found, full, empty, value_rings, weights, at_values, sums, totals, peaks,
                part, parts, begin, end, length, value_rank, values_t, out,
                KV, QUERIES, QUERY_SLOTS, VALUE_STAGES, RANK_STRIDE,
            )),
        ], [4], [VALUE_REGISTERS])  # fmt: skip
