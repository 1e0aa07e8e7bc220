"""Several queries per kv head: rebuilt keys are turned and meet the queries in a second product."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.common import TILE, WARPS
from palu.kernels.decode_attention.hopper.turns import unpacked

# Columns of scores that the matrix units compute at least.
LEAST: gl.constexpr = gl.constexpr(8)


@gluon.jit
def load_queries(
    query, head_step, width, first_slot,
    SLOTS: gl.constexpr, COLUMNS: gl.constexpr, QUERIES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Queries of a kv head in slots first_slot .. of [SLOTS, COLUMNS], zero elsewhere; PAIRED: pairs side by side."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    wanted = gl.arange(0, SLOTS, gl.SliceLayout(1, layout)) - first_slot
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    dim = column // 2 + column % 2 * (width // 2) if PAIRED else column
    ok = ((wanted >= 0) & (wanted < QUERIES))[:, None] & (column < width)[None, :]
    return gl.load(query + (wanted * head_step)[:, None] + dim[None, :], mask=ok, other=0.0).to(gl.float32)


@gluon.jit
def store_queries(
    queries, query, head_step, scaling,
    TOGETHER: gl.constexpr, QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Queries of every kv head to shared memory [KV, LEAST, WIDE], of TOGETHER heads in columns of their own."""
    KV: gl.constexpr = queries.shape[0]
    loaded = ()
    for head in gl.static_range(KV):
        numbers = load_queries(
            query + head * QUERIES * head_step, head_step, WIDTH, head % TOGETHER * QUERY_SLOTS, LEAST,
            queries.shape[2], QUERIES, True,
        )  # fmt: skip
        loaded = loaded + (numbers,)
    for head in gl.static_range(KV):
        queries.index(head).store((loaded[head] * scaling).to(queries.dtype))


@gluon.jit
def rotated(product, turns, DTYPE: gl.constexpr):
    """Rebuilt keys [tile, WIDE], both numbers of a pair side by side, turned, as the next product wants them."""
    WIDE: gl.constexpr = product.shape[1]
    first, second = gl.split(product.reshape([TILE, WIDE // 2, 2]))
    of_pairs: gl.constexpr = first.type.layout
    cos, sin = unpacked(turns, of_pairs, DTYPE)
    turned = gl.join(first * cos - second * sin, second * cos + first * sin)
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, LEAST, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    return gl.convert_layout(turned.reshape([TILE, WIDE]).to(DTYPE), operand, assert_trivial=True)
