"""Cosines and sines of a tile's tokens, as the matrix units' results want them, and what they are multiplied with."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.common import TILE, WARPS, bits_of

# Columns of scores that the matrix units compute at least.
LEAST: gl.constexpr = gl.constexpr(8)
# Columns of a product of latents and factors.
UNIT: gl.constexpr = gl.constexpr(64)


@gluon.constexpr_function
def rows_layout(columns: int) -> gl.DistributedLinearLayout:
    """Rows of a tile as the matrix units' results have them, `columns` of each row shared out among four lanes."""
    each = columns // 4
    return gl.DistributedLinearLayout(
        [[0, 1 << bit] for bit in range(bits_of(each))] + [[8, 0]],
        [[0, each], [0, 2 * each], [1, 0], [2, 0], [4, 0]],
        [[16 << bit, 0] for bit in range(bits_of(WARPS.value))],
        [],
        [TILE.value, columns],
    )


@gluon.constexpr_function
def _halves(dtype: gl.dtype) -> str:
    """Assembly that makes two float32 numbers of a word."""
    if dtype == gl.bfloat16:
        return "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    return "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"


@gluon.jit
def load_turns(table, first, table_t, length, after, PAIRS: gl.constexpr):
    """Cosines and sines of a tile's tokens as words [tile, PAIRS], as `lane_table` has them: of two pairs each.

    after: zeros [tile], without which nothing is loaded.
    """
    layout: gl.constexpr = rows_layout(PAIRS)
    first += gl.convert_layout(after, gl.SliceLayout(1, layout), assert_trivial=True)
    # Behind the last token any numbers do.
    token = gl.minimum(first + gl.arange(0, TILE, gl.SliceLayout(1, layout)), length - 1)
    place = gl.arange(0, PAIRS, gl.SliceLayout(0, layout))
    at = table + gl.cast(token, gl.int64)[:, None] * table_t
    return gl.load(at.to(gl.pointer_type(gl.int32), bitcast=True) + place[None, :])


@gluon.jit
def by_pair(turns):
    """Words of a tile's turns [tile, pairs], pair after pair."""
    PAIRS: gl.constexpr = turns.shape[1]
    return turns.reshape([TILE, 4, PAIRS // 4]).permute([0, 2, 1]).reshape([TILE, PAIRS])


@gluon.jit
def _as_pairs(numbers, product: gl.constexpr):
    """Numbers [tile, UNIT / 2] as pairs stand side by side in products of a layout."""
    # As `split` leaves the halves of a product.
    halves, _ = gl.split(gl.zeros([TILE, UNIT], gl.float32, product).reshape([TILE, UNIT // 2, 2]))
    return gl.convert_layout(numbers, halves.type.layout, assert_trivial=True)


@gluon.jit
def units_of(turns, product: gl.constexpr):
    """Words of a tile's turns, a tuple of [tile, UNIT / 2] as pairs stand side by side in products of a layout."""
    units = (by_pair(turns),)
    if turns.shape[1] > UNIT // 2:
        units = gl.split(units[0].reshape([TILE, 2, UNIT // 2]).permute([0, 2, 1]))
    result = ()
    for unit in gl.static_range(len(units)):
        result = result + (_as_pairs(units[unit], product),)
    return result


@gluon.jit
def unpacked(words, DTYPE: gl.constexpr):
    """Both numbers, float32, of words."""
    # Not pure: heads after heads meet the same numbers, which would be kept unpacked, but there are no registers.
    return gl.inline_asm_elementwise(
        _halves(DTYPE), "=f,=f,r", [words], dtype=(gl.float32, gl.float32), is_pure=False, pack=1
    )


@gluon.jit
def _by_two(numbers):
    """Numbers of every other four of pairs [tile, pairs], and of those between: [tile, pairs / 8, 4] each."""
    PAIRS: gl.constexpr = numbers.shape[1]
    even, odd = gl.split(numbers.reshape([TILE, PAIRS // 8, 2, 4]).permute([0, 1, 3, 2]))
    return even, odd


@gluon.jit
def _in_turn(even, odd):
    """What `_by_two` took apart."""
    return gl.join(even, odd).permute([0, 1, 3, 2]).reshape([TILE, even.shape[1] * 8])


@gluon.jit
def turns_of(words, product: gl.constexpr, HEADS: gl.constexpr, DTYPE: gl.constexpr):
    """Cosines and sines, float32 [tile, UNIT / 2], of a unit's words; of two heads side by side they are the same."""
    cos, sin = _by_two(words)
    even, odd = unpacked(cos, DTYPE)
    cos = _in_turn(even, odd)
    even, odd = unpacked(sin, DTYPE)
    sin = _in_turn(even, odd)
    if HEADS == 2:
        # Half as many words, unpacked once.
        cos = gl.join(cos, cos).permute([0, 2, 1]).reshape([TILE, UNIT // 2])
        sin = gl.join(sin, sin).permute([0, 2, 1]).reshape([TILE, UNIT // 2])
    return _as_pairs(cos, product), _as_pairs(sin, product)


@gluon.jit
def weighed(product, cos, sin, HEADS: gl.constexpr):
    """Products [tile, UNIT] with a and b of every pair, times cosines and sines, added up by each thread.

    float32 [tile, HEADS, 4]: what is left to add up are four neighbouring threads' sums.
    """
    along_a, along_b = gl.split(product.reshape([TILE, UNIT // 2, 2]))
    OF_THREAD: gl.constexpr = UNIT // 2 // HEADS // 4
    # Every product of its own: added up, each is one multiply-add.
    each = gl.join(along_a * cos, along_b * sin).reshape([TILE, HEADS, OF_THREAD, 4, 2]).permute([0, 1, 3, 2, 4])
    return gl.sum(each.reshape([TILE, HEADS, 4, OF_THREAD * 2]), 3)


@gluon.jit
def _turned_words(first, second, words):
    """Turned numbers of pairs, fp16: firsts of every other four, of those between, seconds likewise.

    first, second: float32 [tile, UNIT / 2]. Numbers of two pairs share a register, as cosines and sines do in words.
    """
    cos, sin = _by_two(words)
    first_even, first_odd = _by_two(first)
    second_even, second_odd = _by_two(second)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 first, second, one, other; cvt.rn.f16x2.f32 first, $5, $4; cvt.rn.f16x2.f32 second, $7, $6; "
        "mul.rn.f16x2 one, first, $8; mul.rn.f16x2 other, first, $9; neg.f16x2 first, second; "
        "fma.rn.f16x2 one, first, $9, one; fma.rn.f16x2 other, second, $8, other; "
        "mov.b32 {$0, $1}, one; mov.b32 {$2, $3}, other; }",
        "=h,=h,=h,=h,f,f,f,f,r,r", [first_even, first_odd, second_even, second_odd, cos, sin],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def rotated(product, words, result: gl.constexpr, WORDS: gl.constexpr, DTYPE: gl.constexpr):
    """Rebuilt keys [tile, UNIT], both numbers of a pair side by side, turned, for a product of layout `result`.

    Their order is that of `in_columns`. words: cosines and sines [tile, UNIT / 2] of type WORDS.
    """
    first, second = gl.split(product.reshape([TILE, UNIT // 2, 2]))
    if gl.float16 == DTYPE:
        first_even, first_odd, second_even, second_odd = _turned_words(first, second, words)
    else:
        layout: gl.constexpr = product.type.layout
        cos, sin = turns_of(words, layout, 1, WORDS)
        first_even, first_odd = _by_two((first * cos - second * sin).to(DTYPE))
        second_even, second_odd = _by_two((second * cos + first * sin).to(DTYPE))
    # Of eights of pairs: [.., 4, 2, 2] to [.., 2, 4, 2], numbers of a pair further apart.
    turned = gl.join(gl.join(first_even, first_odd), gl.join(second_even, second_odd)).permute([0, 1, 4, 2, 3])
    return gl.convert_layout(turned.reshape([TILE, UNIT]), gl.DotOperandLayout(0, result, 2), assert_trivial=True)


@gluon.jit
def in_columns(numbers):
    """Numbers [rows, UNIT] of pairs, first all firsts, in the order of `rotated`."""
    ROWS: gl.constexpr = numbers.shape[0]
    return numbers.reshape([ROWS, 2, UNIT // 16, 2, 4]).permute([0, 2, 1, 4, 3]).reshape([ROWS, UNIT])
