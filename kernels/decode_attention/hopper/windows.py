"""Windows of positions: what latents are multiplied with there instead of every pair's a and b.

Inside a window of positions t0 + s the cosines and sines of all pairs are few columns' combinations,
[cos(s w), sin(s w)] ~ P(s) [C, S]. So q . RoPE_t(B x) = sum_m P_m(s) (W_m . x), made once per window and head of

W_m = sum_i (C_mi q1_i + S_mi q2_i) B_i + (C_mi q2_i - S_mi q1_i) B_{i+D/2},

q1, q2: the query's pairs turned back to the window's first position.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from palu.kernels.decode_attention.hopper.common import WARPS, copied_layout, copy_to_shared, hand_over, synchronize
from palu.kernels.decode_attention.hopper.prologue import copy_halves
from palu.kernels.decode_attention.hopper.turns import UNIT
from palu.kernels.latent_scores.tiles import turn


@gluon.jit
def copy_bases(to, bases, PAIRS: gl.constexpr, WHICH: gl.constexpr):
    """Start copying C or S, fp16 [columns, pairs]: each of two groups of warps one of them."""
    ROWS: gl.constexpr = to.shape[1]
    layout: gl.constexpr = copied_layout(PAIRS)
    place = (gl.arange(0, ROWS, gl.SliceLayout(1, layout)) * PAIRS)[:, None] + gl.arange(
        0, PAIRS, gl.SliceLayout(0, layout)
    )[None, :]
    copy_to_shared(to.index(WHICH), bases + WHICH * ROWS * PAIRS + place)
    async_copy.commit_group()


@gluon.jit
def load_frequencies(frequencies, PAIRS: gl.constexpr, WIDTH: gl.constexpr):
    """Frequencies of all pairs, one a thread."""
    pair = gl.arange(0, PAIRS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    return gl.load(frequencies + pair, mask=pair < WIDTH // 2, other=0.0)


@gluon.jit
def load_own_queries(
    query, query_stride, scaling, layout: gl.constexpr, KV: gl.constexpr, WIDTH: gl.constexpr, WHICH: gl.constexpr,
    PAIRS: gl.constexpr,
):  # fmt: skip
    """Both numbers of every pair of every other query, float32 [pairs] each."""
    pair = gl.arange(0, PAIRS, layout)
    result = ()
    for head in gl.static_range(WHICH, KV, 2):
        at = query + head * query_stride + pair
        first = gl.load(at, mask=pair < WIDTH // 2, other=0.0).to(gl.float32) * scaling
        second = gl.load(at + WIDTH // 2, mask=pair < WIDTH // 2, other=0.0).to(gl.float32) * scaling
        result = result + (first, second)
    return result


@gluon.jit
def _store_turned(turned, own, angle):
    """Queries, turned back by angles [pairs], to shared memory [heads * 2, pairs]."""
    cos, sin = turn(angle)
    for at in gl.static_range(0, len(own), 2):
        turned.index(at).store((own[at] * cos + own[at + 1] * sin).to(turned.dtype))
        turned.index(at + 1).store((own[at + 1] * cos - own[at] * sin).to(turned.dtype))


@gluon.jit
def _with_query(bases, turned, head, operand: gl.constexpr):
    """What a head's factor is multiplied with from the left, for both numbers of the pairs, fp16 [columns, pairs]."""
    by_pair: gl.constexpr = gl.SliceLayout(0, operand)
    along_cos, along_sin = bases.index(0).load(operand), bases.index(1).load(operand)
    first, second = turned.index(head // 2 * 2).load(by_pair), turned.index(head // 2 * 2 + 1).load(by_pair)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 other; mul.rn.f16x2 other, $3, $5; fma.rn.f16x2 $0, $2, $4, other; mul.rn.f16x2 other, $3, $4; "
        "neg.f16x2 other, other; fma.rn.f16x2 $1, $2, $5, other; }",
        "=&r,=&r,r,r,r,r",
        [
            along_cos, along_sin, first[None, :].broadcast_to(along_cos.shape),
            second[None, :].broadcast_to(along_cos.shape),
        ],
        dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def make_window(
    prepared, beside, ready, frequency, own, up, arguments, position, more,
    WIDTH: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Every other kv head's W, to shared memory [KV, columns, RANK], for the window that begins at a position.

    own: `load_own_queries`. beside: shared memory for a head's factor, the first one on its way, which it will be again
    where there are more windows; for the turned queries; and C and S. ready: two groups of warps arrive when they need
    the last window no more, and when theirs is made.
    """
    factor, turned, bases = beside
    up_stride, rank = arguments
    KV: gl.constexpr = prepared.shape[0]
    RANK: gl.constexpr = prepared.shape[2]
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, RANK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    _store_turned(turned, own, position.to(gl.float32) * frequency)
    zeros = gl.zeros([UNIT, RANK], gl.float32, result)
    # What was copied is there, and all warps have done their products with the last window.
    async_copy.wait_group(0)
    hand_over(ready, 0)
    for head in range(WHICH, KV, 2):
        with_first, with_second = _with_query(bases, turned, head, operand)
        # Of another head than the first, the factor has to arrive.
        async_copy.wait_group(0)
        fence_async_shared()
        synchronize()
        made = warpgroup_mma(with_first, factor.index(0), zeros, use_acc=False, is_async=True)
        made = warpgroup_mma(with_second, factor.index(1), made, is_async=True)
        made, with_first, with_second = warpgroup_mma_wait(0, deps=[made, with_first, with_second])
        # All warps have read the factor.
        synchronize()
        last = head + 2 >= KV
        following = gl.where(last, WHICH, head + 2)
        wanted = gl.where(last & (more == 0), 0, rank)
        copy_halves(factor, up + following * WIDTH * up_stride, up_stride, wanted, 0, WIDTH)
        prepared.index(head).store(made.to(prepared.dtype))
    hand_over(ready, 1)
