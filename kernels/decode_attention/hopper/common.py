"""What both halves of the kernel share: layouts, copies of latents into shared memory, codes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

# Its name changed between versions of Triton.
synchronize = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
WARPS: gl.constexpr = gl.constexpr(4)
TILE: gl.constexpr = gl.constexpr(64)


@gluon.constexpr_function
def bits_of(size):
    """The exponent of a power of two."""
    return size.bit_length() - 1


@gluon.constexpr_function
def _codes_of(bits, step, less_zeros):
    """Assembly that takes code `step` of each half of a word and makes two fp16 numbers of them.

    A code or-ed into the mantissa of 1024 is 1024 + code.
    """
    lowest, middle = ((1 << bits) - 1) * 0x10001, 0x64006400 + (1 << bits - 1) * 0x10001
    return (
        f"{{ .reg .b32 pair, middle; shr.u32 pair, $2, {step * bits}; "
        f"lop3.b32 pair, pair, 0x{lowest:08x}, 0x64006400, 0xea; mov.b32 middle, 0x{middle:08x}; "
        f"sub.f16x2 pair, pair, middle; {'sub.f16x2 pair, pair, $3; ' if less_zeros else ''}mov.b32 {{$0, $1}}, pair; }}"
    )


@gluon.constexpr_function
def copied_layout(columns):
    """Rows of 16-bit numbers, 16 bytes a thread."""
    across = columns // 8
    return gl.BlockedLayout([1, 8], [32 // across, across], [WARPS.value, 1], [1, 0])


@gluon.constexpr_function
def words_layout(words):
    """Rows of words, 16 bytes a thread."""
    across = max(1, words // 4)
    return gl.BlockedLayout([1, min(words, 4)], [32 // across, across], [WARPS.value, 1], [1, 0])


@gluon.jit
def copy_rows(to, source, first, step, length, column, rank, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Start copying ROWS tokens' latents column .. column + COLUMNS into shared memory, zero where there are none."""
    layout: gl.constexpr = copied_layout(COLUMNS)
    token = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    latent = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    at = source + gl.cast(first, gl.int64) * step + ((token * step)[:, None] + latent[None, :])
    ok = (token < length - first)[:, None] & (latent < rank)[None, :]
    async_copy.async_copy_global_to_shared(to, at, mask=ok)


@gluon.jit
def load_words(
    source, first, step, length, column, rank, ROWS: gl.constexpr, COLUMNS: gl.constexpr, BITS: gl.constexpr
):
    """The words of ROWS tokens' codes column .. column + COLUMNS, zero where there are none."""
    WORDS: gl.constexpr = COLUMNS * BITS // 32
    layout: gl.constexpr = words_layout(WORDS)
    token = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    word = column * BITS // 32 + gl.arange(0, WORDS, gl.SliceLayout(0, layout))
    at = (source + gl.cast(first, gl.int64) * step).to(gl.pointer_type(gl.int32), bitcast=True)
    ok = (token < length - first)[:, None] & (word < rank * BITS // 32)[None, :]
    return gl.load(at + ((token * (step // 4))[:, None] + word[None, :]), mask=ok, other=0)


@gluon.jit
def unpacked(words, zero, BITS: gl.constexpr, ASYMMETRIC: gl.constexpr):
    """Codes less the middle code, and less zero points [rows], in the order of `latent_order`: fp16 [rows, columns].

    zero: two fp16 numbers in a word, the same twice.
    """
    ROWS: gl.constexpr = words.shape[0]
    WORDS: gl.constexpr = words.shape[1]
    STEPS: gl.constexpr = 16 // BITS
    pieces = ()
    for step in gl.static_range(STEPS):
        low, high = gl.inline_asm_elementwise(
            _codes_of(BITS, step, ASYMMETRIC), "=h,=h,r,r", [words, zero[:, None]], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
        )
        pieces = pieces + (gl.join(low, high),)
    if STEPS == 2:
        whole = gl.join(pieces[0], pieces[1]).permute([0, 3, 1, 2])
    else:
        gl.static_assert(STEPS == 4)
        even, odd = gl.join(pieces[0], pieces[2]), gl.join(pieces[1], pieces[3])
        whole = gl.join(even, odd).permute([0, 3, 4, 1, 2])
    return whole.reshape([ROWS, STEPS * 2 * WORDS])
