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
    at = table + token[:, None] * table_t
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
def unpacked(words):
    """Both fp16 numbers of words, float32."""
    # Not pure: heads after heads meet the same numbers, which would be kept unpacked, but there are no registers.
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
        "=f,=f,r",
        [words],
        dtype=(gl.float32, gl.float32),
        is_pure=False,
        pack=1,
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
def turns_of(words, product: gl.constexpr, HEADS: gl.constexpr):
    """Cosines and sines, float32 [tile, UNIT / 2], of a unit's words; of two heads side by side they are the same."""
    cos, sin = _by_two(words)
    even, odd = unpacked(cos)
    cos = _in_turn(even, odd)
    even, odd = unpacked(sin)
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
def place_in_factor(row):
    """Which pair of a unit, and which number of it, has a row of a factor for keys that are turned.

    Of eight pairs the first numbers, then the second ones: those of two pairs, which share words of `lane_table`, are
    neighbours, as they are in turned keys.
    """
    return row // 16 * 8 + row % 8 // 2 + row % 2 * 4, row // 8 % 2


@gluon.jit
def _twice(one, other, layout: gl.constexpr):
    """Numbers for two neighbours each."""
    return gl.convert_layout(gl.join(one, other), layout, assert_trivial=True)


@gluon.jit
def _turned_in_half(first, second, words):
    """Both numbers of pairs turned, fp16 [tile, UNIT / 16, 4, 2]; words of cosines, of sines [tile, UNIT / 16, 4]."""
    layout: gl.constexpr = first.type.layout
    cos, sin = _twice(words[0], words[0], layout), _twice(words[1], words[1], layout)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 less; mul.rn.f16x2 $0, $2, $4; mul.rn.f16x2 $1, $2, $6; neg.f16x2 less, $3; "
        "fma.rn.f16x2 $0, less, $6, $0; fma.rn.f16x2 $1, $3, $4, $1; }",
        "=&r,=&r,r,r,r,r,r,r", [first, second, cos, sin],
        dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def rotated(product, words, result: gl.constexpr, DTYPE: gl.constexpr):
    """Rebuilt keys [tile, UNIT] in the order of `place_in_factor`, turned, for a product of layout `result`.

    words: cosines and sines [tile, UNIT / 2].
    """
    # Of eights of pairs: numbers of a pair, lanes, pairs that share words.
    first, second = gl.split(product.reshape([TILE, UNIT // 16, 2, 4, 2]).permute([0, 1, 3, 4, 2]))
    words = _by_two(words)
    if gl.float16 == DTYPE:
        first, second = _turned_in_half(first.to(DTYPE), second.to(DTYPE), words)
    else:
        cos, more_cos = unpacked(words[0])
        sin, more_sin = unpacked(words[1])
        layout: gl.constexpr = first.type.layout
        cos, sin = _twice(cos, more_cos, layout), _twice(sin, more_sin, layout)
        first, second = (first * cos - second * sin).to(DTYPE), (second * cos + first * sin).to(DTYPE)
    turned = gl.join(first, second).permute([0, 1, 4, 2, 3]).reshape([TILE, UNIT])
    return gl.convert_layout(turned, gl.DotOperandLayout(0, result, 2), assert_trivial=True)


@gluon.jit
def in_columns(numbers):
    """Numbers [rows, UNIT] of pairs, first all firsts, in the order of `place_in_factor`."""
    ROWS: gl.constexpr = numbers.shape[0]
    return numbers.reshape([ROWS, 2, UNIT // 16, 2, 4]).permute([0, 2, 1, 4, 3]).reshape([ROWS, UNIT])
