"""What all groups of warps share: which tiles are theirs, copies of latents into shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from palu.kernels.latent_scores.tiles import HIDING

# Their names changed between versions of Triton.
synchronize = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
copy_to_shared = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
REINTERPRETS: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
WARPS: gl.constexpr = gl.constexpr(4)
TILE: gl.constexpr = gl.constexpr(64)
# Tiles whose masks are looked at together.
LOOKED_AT: gl.constexpr = gl.constexpr(32)


@gluon.constexpr_function
def bits_of(size: int) -> int:
    """The exponent of a power of two."""
    return size.bit_length() - 1


@gluon.constexpr_function
def copied_layout(columns: int, bits: int = 16) -> gl.BlockedLayout:
    """Rows of numbers of so many bits, 16 bytes a thread."""
    each = 128 // bits
    across = min(32, columns // each)
    return gl.BlockedLayout([1, each], [32 // across, across], [WARPS.value, 1], [1, 0])


@gluon.jit
def place_of(rank_of, offset_of, group, EVEN: gl.constexpr, DIVISOR: gl.constexpr):
    """A group's latents and those before it; EVEN: those of every group, which need no memory access, or 0."""
    if EVEN > 0:
        rank, offset = gl.to_tensor(EVEN), group * EVEN
    else:
        rank, offset = gl.load(rank_of + group), gl.load(offset_of + group)
    return gl.multiple_of(rank, DIVISOR), gl.multiple_of(offset, DIVISOR)


@gluon.jit
def _approximate(instruction: gl.constexpr, numbers):
    return gl.inline_asm_elementwise(
        instruction + ".approx.ftz.f32 $0, $1;", "=f,f", [numbers], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def exp2(numbers):
    """Powers of two of float32 numbers; subnormal results are zero, as in the two below, which saves instructions."""
    return _approximate("ex2", numbers)


@gluon.jit
def log2(numbers):
    """Logarithms of normal float32 numbers."""
    return _approximate("lg2", numbers)


@gluon.jit
def reciprocal(numbers):
    """One over float32 numbers, to a unit in the last place."""
    return _approximate("rcp", numbers)


@gluon.jit
def reciprocal_root(numbers):
    """One over the square roots of normal float32 numbers."""
    return _approximate("rsqrt", numbers)


@gluon.jit
def _every_thread(instruction: gl.constexpr):
    warps: gl.constexpr = gl.num_warps()
    threads = gl.arange(0, 32 * warps, gl.BlockedLayout([1], [32], [warps], [0]))
    gl.inline_asm_elementwise(
        instruction + " mov.b32 $0, $1;", "=r,r", [threads], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def allow_launch_after():
    """The launch after this one may begin where there is room, if it is made so (`launch_pdl`)."""
    _every_thread("griddepcontrol.launch_dependents;")


@gluon.jit
def wait_for_launch_before():
    """Wait until all programs of the launch before have ended, and what they wrote can be read.

    A launch that is made to begin early reads without that only what is there before the launch before it.
    """
    _every_thread("griddepcontrol.wait;")


@gluon.jit
def hand_over(barrier, phase: gl.constexpr):
    """What this group of warps stored is ready for the matrix units; go on when the other's is too."""
    fence_async_shared()
    synchronize()
    mbarrier.arrive(barrier, count=1)
    mbarrier.wait(barrier, phase)


@gluon.jit
def seen_as(memory, PARTS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as PARTS matrices [ROWS, COLUMNS]."""
    if REINTERPRETS:
        other = memory.reinterpret(memory.dtype, [PARTS, ROWS, COLUMNS], layout)
    else:
        other = memory._reinterpret(memory.dtype, [PARTS, ROWS, COLUMNS], layout)
    return other


@gluon.jit
def buffer_in(memory, WHICH: gl.constexpr, done, EITHER: gl.constexpr):
    """The buffer of a group's tile `done` in shared memory for scores, or for what is said of them.

    memory: an allocation with both groups' buffers, or one each. EITHER: the group has both buffers by turns.
    """
    if EITHER:
        buffer = memory[0].index(done % 2)
    elif len(memory) == 1:
        buffer = memory[0].index(WHICH)
    else:
        buffer = memory[WHICH].index(0)
    return buffer


@gluon.jit
def phase_of(done, EITHER: gl.constexpr):
    """The phase of a barrier that is `buffer_in`: how often the buffer has been in turn before."""
    return (done // 2 if EITHER else done) & 1


@gluon.jit
def copy_rows(to, source, first, step, end, column, rank, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Start copying ROWS tokens' latents column .. column + COLUMNS into shared memory, zero from token `end` on."""
    layout: gl.constexpr = copied_layout(COLUMNS, to.dtype.primitive_bitwidth)
    token = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    latent = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    at = source + gl.cast(first, gl.int64) * step + ((token * step)[:, None] + latent[None, :])
    ok = (token < end - first)[:, None] & (latent < rank)[None, :]
    copy_to_shared(to, at, mask=ok)


@gluon.jit
def load_seen(mask, row_mask, mask_t, token, ok, MASK: gl.constexpr):
    """Of tokens of any shape: what the mask adds to their scores, minus infinity where it hides them."""
    seen = gl.where(ok, 0.0, float("-inf"))
    if MASK == "bool":
        seen = gl.where(gl.load(mask + row_mask + token * mask_t, mask=ok, other=0) != 0, seen, float("-inf"))
    elif MASK == "additive":
        added = gl.load(mask + row_mask + token * mask_t, mask=ok, other=0.0).to(gl.float32)
        seen = gl.where(added > HIDING, seen + added, float("-inf"))
    return seen


@gluon.jit
def visible_tiles(mask, row_mask, mask_t, first, step, count, length, MASK: gl.constexpr):
    """From which to which of the tiles first, first + step, .. tokens are visible: indices of the first and the end."""
    begin, end = 0, count
    if MASK != "none":
        layout: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [WARPS, 1], [1, 0])
        inside = gl.arange(0, TILE, gl.SliceLayout(0, layout))
        lowest = gl.full([LOOKED_AT, TILE], count, gl.int32, layout)
        highest = gl.zeros([LOOKED_AT, TILE], gl.int32, layout)
        for several in range(0, count, LOOKED_AT):
            index = several + gl.arange(0, LOOKED_AT, gl.SliceLayout(1, layout))
            token = ((first + index * step) * TILE)[:, None] + inside[None, :]
            ok = (index < count)[:, None] & (token < length)
            seen = load_seen(mask, row_mask, mask_t, token, ok, MASK) > float("-inf")
            lowest = gl.where(seen, gl.minimum(lowest, index[:, None]), lowest)
            highest = gl.where(seen, gl.maximum(highest, index[:, None] + 1), highest)
        begin = gl.min(gl.min(lowest, 1), 0)
        end = gl.max(gl.max(highest, 1), 0)
    return begin, end
