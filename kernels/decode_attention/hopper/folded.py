"""One query per kv head, which is folded into the up factor: a score is one multiply-add per product.

q . RoPE_t(B x) = sum_i cos(t w_i) (a_i . x) + sin(t w_i) (b_i . x),
a_i = q_i B_i + q_{i+D/2} B_{i+D/2},   b_i = q_{i+D/2} B_i - q_i B_{i+D/2}.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.common import TILE, WARPS
from palu.kernels.decode_attention.hopper.turns import unpacked

# Rows of a factor that are folded at a time.
ROWS: gl.constexpr = gl.constexpr(32)


@gluon.jit
def _fold(factor, q_first, q_second):
    """Rows of both numbers of a pair, side by side in shared memory [ROWS, RANK], become a and b of the pair."""
    RANK: gl.constexpr = factor.shape[1]
    across: gl.constexpr = RANK // 8
    layout: gl.constexpr = gl.BlockedLayout([2, 8], [32 // across, across], [WARPS, 1], [1, 0])
    rows = factor.load(layout).reshape([ROWS // 2, 2, RANK]).permute([0, 2, 1])
    first, second = gl.split(rows)
    of_pair: gl.constexpr = gl.SliceLayout(1, first.type.layout)
    q_first = gl.convert_layout(q_first, of_pair)[:, None]
    q_second = gl.convert_layout(q_second, of_pair)[:, None]
    first, second = first.to(gl.float32), second.to(gl.float32)
    a = q_first * first + q_second * second
    b = q_second * first - q_first * second
    folded = gl.join(a, b).permute([0, 2, 1]).reshape([ROWS, RANK])
    factor.store(gl.convert_layout(folded, layout).to(factor.dtype))


@gluon.jit
def load_pairs(
    query, head_step, scaling, KV: gl.constexpr, WIDE: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr
):
    """Both numbers of every pair of the kv heads' queries, in pieces as `fold` needs them."""
    across: gl.constexpr = RANK // 8
    layout: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [32 // across, across], [WARPS, 1], [1, 0]))
    q_first, q_second = (), ()
    for head in gl.static_range(KV):
        for row in gl.static_range(0, WIDE, ROWS):
            pair = row // 2 + gl.arange(0, ROWS // 2, layout)
            ok = pair < WIDTH // 2
            at = query + head * head_step + pair
            q_first = q_first + (gl.load(at, mask=ok, other=0.0).to(gl.float32) * scaling,)
            q_second = q_second + (gl.load(at + WIDTH // 2, mask=ok, other=0.0).to(gl.float32) * scaling,)
    return q_first, q_second


@gluon.jit
def fold(factors, q_first, q_second):
    """Factors of every kv head [KV, WIDE, RANK] in shared memory, folded with its query."""
    KV: gl.constexpr = factors.shape[0]
    PIECES: gl.constexpr = factors.shape[1] // ROWS
    for head in gl.static_range(KV):
        for piece in gl.static_range(PIECES):
            _fold(
                factors.index(head).slice(piece * ROWS, ROWS), q_first[head * PIECES + piece],
                q_second[head * PIECES + piece],
            )  # fmt: skip


@gluon.jit
def weighed(product, turns, DTYPE: gl.constexpr):
    """Products [tile, WIDE] with a and b of every pair, times cosines and sines, added up to [tile]."""
    WIDE: gl.constexpr = product.shape[1]
    layout: gl.constexpr = product.type.layout
    along_a, along_b = gl.split(product.reshape([TILE, WIDE // 2, 2]))
    of_pairs: gl.constexpr = along_a.type.layout
    cos, sin = unpacked(turns, of_pairs, DTYPE)
    total = gl.sum(along_a * cos + along_b * sin, 1)
    return gl.convert_layout(total, gl.SliceLayout(1, layout), assert_trivial=True)
