"""Adds up the parts of all programs on Hopper, begun while the last of these still run.

Each warp has its own latents of all parts, so that the warps exchange only the means.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.common import bits_of, place_of, wait_for_launch_before
from palu.kernels.decode_attention.kernel import LOWEST

# Warps of a program, and numbers that it computes: all programs of a head read all parts.
WARPS: gl.constexpr = gl.constexpr(8)
OUTPUTS: gl.constexpr = gl.constexpr(64)


@gluon.constexpr_function
def _sums_layout(parts: int, latents: int) -> gl.DistributedLinearLayout:
    """Parts and latents: four neighbouring latents of a range of parts a thread, a warp's latents of all parts."""
    lanes = bits_of(latents // WARPS.value // 4)
    inside = [[0, 1], [0, 2]]
    across = [[0, 4 << bit] for bit in range(lanes)]
    later = 5 - lanes
    held = [[1 << bit, 0] for bit in range(bits_of(parts) - later)]
    across += [[parts >> (later - bit), 0] for bit in range(later)]
    warps = [[0, latents // WARPS.value << bit] for bit in range(bits_of(WARPS.value))]
    return gl.DistributedLinearLayout([*inside, *held], across, warps, [], [parts, latents])


@gluon.jit(do_not_specialize=["parts", "rows_heads"])
def hopper_combine_kernel(
    sums, totals, peaks, up, bias, output, rank_of, offset_of, parts, rows_heads, up_stride,
    HEADS: gl.constexpr, HEADS_PER_GROUP: gl.constexpr, QUERIES: gl.constexpr, HEAD_DIM: gl.constexpr,
    RANK_STRIDE: gl.constexpr, PARTS: gl.constexpr, LATENTS: gl.constexpr,
    HAS_BIAS: gl.constexpr, DIVISOR: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """OUTPUTS of a head: the up factor times its mean latents. Arguments as those of `combine_kernel`.

    PARTS, LATENTS: powers of two, at least as many as there are.
    """
    row_head, piece = gl.program_id(0), gl.program_id(1)
    head = row_head % HEADS
    group = head // HEADS_PER_GROUP
    rank, offset = place_of(rank_of, offset_of, group, EVEN, DIVISOR)
    by_out: gl.constexpr = gl.BlockedLayout([OUTPUTS // WARPS, min(8, LATENTS // 32)], [1, 32], [WARPS, 1], [1, 0])
    out = piece * OUTPUTS + gl.arange(0, OUTPUTS, gl.SliceLayout(1, by_out))
    latent = gl.arange(0, LATENTS, gl.SliceLayout(0, by_out))
    row = head // QUERIES % (HEADS_PER_GROUP // QUERIES) * HEAD_DIM + out
    ok = (out < HEAD_DIM)[:, None] & (latent < rank)[None, :]
    factor = gl.load(up + offset + (row * up_stride)[:, None] + latent[None, :], mask=ok, other=0.0)
    wait_for_launch_before()
    by_part: gl.constexpr = _sums_layout(PARTS, LATENTS)
    # Behind the last part its numbers are read again, to be multiplied by zero.
    part = gl.minimum(gl.arange(0, PARTS, gl.SliceLayout(1, by_part)), parts - 1)
    latent = gl.arange(0, LATENTS, gl.SliceLayout(0, by_part))
    at_sums = sums + row_head.to(gl.int64) * RANK_STRIDE
    found = gl.load(
        at_sums + (part * rows_heads * RANK_STRIDE)[:, None] + latent[None, :], mask=(latent < rank)[None, :]
    )
    each: gl.constexpr = gl.BlockedLayout([max(1, PARTS // 32)], [32], [WARPS], [0])
    part = gl.arange(0, PARTS, each)
    at = part * rows_heads + row_head
    peak = gl.load(peaks + at, mask=part < parts, other=LOWEST)
    total = gl.load(totals + at, mask=part < parts, other=0.0)
    share = gl.where(part < parts, gl.exp2(peak - gl.max(peak, 0)), 0.0)
    share *= 1.0 / gl.maximum(gl.sum(share * total, 0), 1e-30)
    share = gl.convert_layout(share, gl.SliceLayout(1, by_part))
    mean = gl.where(latent < rank, gl.sum(found * share[:, None], 0), 0.0)
    mean = gl.convert_layout(mean, gl.SliceLayout(0, by_out))
    result = gl.sum(factor.to(gl.float32) * mean[None, :], 1)
    if HAS_BIAS:
        result += gl.load(bias + head // QUERIES * HEAD_DIM + out, mask=out < HEAD_DIM, other=0.0).to(gl.float32)
    gl.store(output + row_head * HEAD_DIM + out, result.to(output.dtype.element_ty), mask=out < HEAD_DIM)
