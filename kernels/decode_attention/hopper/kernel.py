"""Decode attention over latents on Hopper: one launch for scores and values, which half of the warps each compute."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from palu.kernels.decode_attention.hopper.common import TILE, synchronize
from palu.kernels.decode_attention.hopper.scores import score_partition
from palu.kernels.decode_attention.hopper.values import CHUNK, STEP, value_partition


@gluon.jit(
    do_not_specialize=["length", "blocks", "rows_per_start", "table_b", "tiles", "key_scales_b", "value_scales_b", "mask_b",
        "first_part", "rows_heads"]
)  # fmt: skip
def hopper_kernel(
    keys, key_scales, values, value_scales, table, starts, slow_weights, fast_weights, scores, mask, sums, totals,
    peaks, key_rank_of, key_byte_of, value_rank_of, value_byte_of,
    length, blocks, tiles, keys_b, keys_t, key_scales_b, key_scales_t, values_b, values_t, value_scales_b,
    value_scales_t, table_b, table_t, mask_b, mask_t, rows_per_start, stored, stored_from, first_part, rows_heads,
    GROUPS: gl.constexpr, KV: gl.constexpr, SLOTS: gl.constexpr, QUERY_ROWS: gl.constexpr, PLACES: gl.constexpr,
    SPAN: gl.constexpr, RANK: gl.constexpr, KEY_STAGES: gl.constexpr, KEY_DIVISOR: gl.constexpr, CHUNKS: gl.constexpr,
    VALUE_STAGES: gl.constexpr, VALUE_DIVISOR: gl.constexpr, RANK_STRIDE: gl.constexpr, BITS: gl.constexpr,
    KEY_ASYMMETRIC: gl.constexpr, VALUE_ASYMMETRIC: gl.constexpr, MASK: gl.constexpr, DTYPE: gl.constexpr,
    VALUE_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Sums of value latents of a group's heads over `tiles` tiles of tokens, as `values_kernel` leaves them."""
    part, group, row = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    at_row = row // QUERY_ROWS
    rank = gl.multiple_of(gl.load(key_rank_of + group), KEY_DIVISOR)
    value_rank = gl.multiple_of(gl.load(value_rank_of + group), VALUE_DIVISOR)
    UNIT: gl.constexpr = BITS // 8 if BITS > 8 else 1
    first = part * tiles
    last = gl.minimum(gl.cdiv(length, TILE), first + tiles)
    HALF: gl.constexpr = KV * PLACES // 2
    SLOW: gl.constexpr = KV * 8
    dtype: gl.constexpr = DTYPE
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128 if RANK >= 64 else 2 * RANK, 16, rank=2)
    chunked: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    key_ring = gl.allocate_shared_memory(dtype, [KEY_STAGES, TILE, RANK], swizzled)
    first_half = gl.allocate_shared_memory(dtype, [HALF, RANK], swizzled)
    second_half = gl.allocate_shared_memory(dtype, [HALF, RANK], swizzled)
    # A buffer for each chunk, so that the compiler sees that copies do not overlap.
    value_rings = ()
    for _ in gl.static_range(CHUNKS):
        value_rings = value_rings + (gl.allocate_shared_memory(dtype, [VALUE_STAGES, STEP, CHUNK], chunked),)
    weights = gl.allocate_shared_memory(dtype, [2, SLOTS, STEP], gl.NVMMASharedLayout(64, 16, rank=2))
    found = gl.allocate_shared_memory(gl.float32, [2, TILE, SLOTS], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=1)
    fence_async_shared()
    synchronize()
    lane = (row * GROUPS + group).to(gl.int64)
    at_keys = keys + at_row.to(gl.int64) * keys_b + gl.multiple_of(gl.load(key_byte_of + group), KEY_DIVISOR * UNIT if UNIT > 1 else KEY_DIVISOR * BITS // 8)
    at_values = values + at_row.to(gl.int64) * values_b + gl.multiple_of(gl.load(value_byte_of + group), VALUE_DIVISOR if BITS > 8 else VALUE_DIVISOR * BITS // 8)
    at_key_scales = key_scales + (gl.multiple_of(at_row * key_scales_b, 2) + group * (2 if KEY_ASYMMETRIC else 1))
    at_value_scales = value_scales + (gl.multiple_of(at_row * value_scales_b, 2) + group * (2 if VALUE_ASYMMETRIC else 1))
    at_slow = slow_weights + (row.to(gl.int64) * blocks * GROUPS + group) * (SLOW * RANK)
    at_fast = fast_weights + lane * ((2 * HALF - SLOW) * RANK)
    out = (first_part + part) * rows_heads + (row * GROUPS + group) * KV
    gl.warp_specialize(
        [
            (score_partition, (
                found, full, empty, key_ring, first_half, second_half,
                at_keys, at_key_scales, table + gl.multiple_of(at_row * table_b, 8),
                starts + row // rows_per_start * blocks, at_slow, at_fast, scores + stored_from, mask,
                first, last, length, blocks, rank, keys_t, key_scales_t, table_t, row * mask_b, mask_t,
                GROUPS * SLOW * RANK, KV, (row * GROUPS + group) * SLOTS, stored,
                KV, PLACES, SPAN, RANK, KEY_STAGES, BITS, KEY_ASYMMETRIC, MASK,
            )),
            (value_partition, (
                found, full, empty, value_rings, weights,
                at_values, at_value_scales, sums, totals, peaks,
                first, last, length, value_rank, values_t, value_scales_t, KV, out,
                KV, SLOTS, CHUNKS, VALUE_STAGES, RANK_STRIDE, BITS, VALUE_ASYMMETRIC,
            )),
        ],
        [4],
        [VALUE_REGISTERS],
    )  # fmt: skip
