"""Adds up the parts of all programs on Hopper, begun while the last of these still run.

Each warp adds up parts of its own, of which it reads a row of neighbours at a time, and the warps exchange their sums.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.common import exp2, place_of, synchronize, wait_for_launch_before
from palu.kernels.decode_attention.kernel import LOWEST

# Warps of a program, latents that they take at a time, and so many times at most.
WARPS: gl.constexpr = gl.constexpr(8)
CHUNK: gl.constexpr = gl.constexpr(128)
MOST_CHUNKS: gl.constexpr = gl.constexpr(6)
# Chunks of which the warps' sums take more than half of a multiprocessor's shared memory.
ALONE_CHUNKS: gl.constexpr = gl.constexpr(32)


@gluon.jit(do_not_specialize=["parts", "rows_heads"])
def hopper_combine_kernel(
    means, logarithms, up, bias, output, rank_of, offset_of, parts, rows_heads, up_stride,
    HEADS: gl.constexpr, HEADS_PER_GROUP: gl.constexpr, QUERIES: gl.constexpr, HEAD_DIM: gl.constexpr,
    RANK_STRIDE: gl.constexpr, PARTS: gl.constexpr, CHUNKS: gl.constexpr, OUTPUTS: gl.constexpr, ALONE: gl.constexpr,
    HAS_BIAS: gl.constexpr, DIVISOR: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """OUTPUTS of a head: the up factor times its mean latents, those of all parts weighed.

    means, logarithms: as `hopper_kernel` leaves them; the other arguments as those of `combine_kernel`. PARTS, CHUNKS:
    at least as many as there are, PARTS a power of two. ALONE: programs take so much shared memory that each has a
    multiprocessor to itself; else those that begin early would crowd on the first ones that are free.
    """
    row_head, piece = gl.program_id(0), gl.program_id(1)
    head = row_head % HEADS
    group = head // HEADS_PER_GROUP
    rank, offset = place_of(rank_of, offset_of, group, EVEN, DIVISOR)
    by_out: gl.constexpr = gl.BlockedLayout([OUTPUTS // WARPS, CHUNK // 32], [1, 32], [WARPS, 1], [1, 0])
    out = piece * OUTPUTS + gl.arange(0, OUTPUTS, gl.SliceLayout(1, by_out))
    row = head // QUERIES % (HEADS_PER_GROUP // QUERIES) * HEAD_DIM + out
    at_up = up + offset + (row * up_stride)[:, None]
    factors = ()
    for chunk in gl.static_range(CHUNKS):
        latent = chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, by_out))
        ok = (out < HEAD_DIM)[:, None] & (latent < rank)[None, :]
        factors = factors + (gl.load(at_up + latent[None, :], mask=ok, other=0.0),)
    by_part: gl.constexpr = gl.BlockedLayout([PARTS // WARPS, CHUNK // 32], [1, 32], [WARPS, 1], [1, 0])
    part = gl.arange(0, PARTS, gl.SliceLayout(1, by_part))
    # Behind the last part its numbers are read again, to be multiplied by zero.
    own = gl.minimum(part, parts - 1) * rows_heads + row_head
    at_means = means + (own * RANK_STRIDE)[:, None]
    wait_for_launch_before()
    found = ()
    for chunk in gl.static_range(CHUNKS):
        latent = chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, by_part))
        found = found + (gl.load(at_means + latent[None, :], mask=(latent < rank)[None, :], other=0.0),)
    # Else the assembler would ask for means when logarithms are there.
    synchronize()
    each: gl.constexpr = gl.BlockedLayout([max(1, PARTS // 32)], [32], [WARPS], [0])
    every = gl.arange(0, PARTS, each)
    logarithm = gl.load(logarithms + every * rows_heads + row_head, mask=every < parts, other=LOWEST)
    most = gl.max(logarithm, 0)
    total = gl.sum(gl.where(every < parts, exp2(logarithm - most), 0.0), 0)
    share = gl.where(part < parts, exp2(gl.load(logarithms + own) - most), 0.0)
    sums = _sums(found, share, ALONE_CHUNKS if ALONE else CHUNKS)
    products = gl.zeros([OUTPUTS, CHUNK], gl.float32, by_out)
    for chunk in gl.static_range(CHUNKS):
        products += factors[chunk].to(gl.float32) * sums.index(chunk).load(gl.SliceLayout(0, by_out))[None, :]
    result = gl.sum(products, 1) * (1.0 / total)
    if HAS_BIAS:
        result += gl.load(bias + head // QUERIES * HEAD_DIM + out, mask=out < HEAD_DIM, other=0.0).to(gl.float32)
    gl.store(output + row_head * HEAD_DIM + out, result.to(output.dtype.element_ty), mask=out < HEAD_DIM)


@gluon.jit
def _sums(found, share, ROOM: gl.constexpr):
    """Weighed sums of latents, chunk after chunk in shared memory. ROOM: chunks that there is room for on the way."""
    PARTS: gl.constexpr = found[0].shape[0]
    of_warps = gl.allocate_shared_memory(gl.float32, [ROOM, WARPS, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for chunk in gl.static_range(len(found)):
        weighed = (found[chunk].to(gl.float32) * share[:, None]).reshape([WARPS, PARTS // WARPS, CHUNK])
        of_warps.index(chunk).store(gl.sum(weighed, 1))
    by_latent: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [len(found), CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for chunk in gl.static_range(len(found)):
        sums.index(chunk).store(gl.sum(of_warps.index(chunk).load(by_latent), 0))
    return sums
