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
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from palu.kernels.decode_attention.hopper.common import WARPS, copied_layout, copy_to_shared, synchronize
from palu.kernels.decode_attention.hopper.operands import unit_order
from palu.kernels.latent_scores.tiles import turn

# Columns of a window's basis.
COLUMNS: gl.constexpr = gl.constexpr(64)


@gluon.jit
def copy_halves(to, up, up_stride, rank, WIDTH: gl.constexpr):
    """Start copying a kv head's up factor [2, pairs, RANK], both numbers of its pairs; zero where there are none."""
    PAIRS: gl.constexpr = to.shape[1]
    RANK: gl.constexpr = to.shape[2]
    layout: gl.constexpr = copied_layout(RANK)
    pair = gl.arange(0, PAIRS, gl.SliceLayout(1, layout))
    latent = gl.arange(0, RANK, gl.SliceLayout(0, layout))
    ok = (pair < WIDTH // 2)[:, None] & (latent < rank)[None, :]
    at = up + (pair * up_stride)[:, None] + latent[None, :]
    for half in gl.static_range(2):
        copy_to_shared(to.index(half), at + half * (WIDTH // 2) * up_stride, mask=ok)
    async_copy.commit_group()


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
def make_window(
    prepared, beside, ready, frequencies, query, up, arguments, position, more,
    WIDTH: gl.constexpr, BITS: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Every other kv head's W, to shared memory [KV, columns, RANK], for the window that begins at a position.

    beside: shared memory for a head's factor, the first one on its way, which it will be again where there are more
    windows; for a turned query [2, pairs]; and C and S. ready: two groups of warps arrive when they need the last
    window no more, and when theirs is made.
    """
    factor, turned, bases = beside
    up_stride, rank, query_stride, scaling = arguments
    KV: gl.constexpr = prepared.shape[0]
    COLUMNS: gl.constexpr = prepared.shape[1]
    RANK: gl.constexpr = prepared.shape[2]
    PAIRS: gl.constexpr = factor.shape[1]
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, RANK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    by_pair: gl.constexpr = gl.SliceLayout(0, operand)
    pair = gl.arange(0, PAIRS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    there = pair < WIDTH // 2
    cos, sin = turn(position.to(gl.float32) * gl.load(frequencies + pair, mask=there, other=0.0))
    zeros = gl.zeros([COLUMNS, RANK], gl.float32, result)
    # What was copied is there, and all warps have done their products with the last window.
    async_copy.wait_group(0)
    fence_async_shared()
    synchronize()
    mbarrier.arrive(ready, count=1)
    mbarrier.wait(ready, 0)
    for head in range(WHICH, KV, 2):
        at_query = query + head * query_stride + pair
        first = gl.load(at_query, mask=there, other=0.0).to(gl.float32) * scaling
        second = gl.load(at_query + WIDTH // 2, mask=there, other=0.0).to(gl.float32) * scaling
        turned.index(0).store(first * cos + second * sin)
        turned.index(1).store(second * cos - first * sin)
        # Of another head than the first, the factor has to arrive.
        async_copy.wait_group(0)
        fence_async_shared()
        synchronize()
        first, second = turned.index(0).load(by_pair)[None, :], turned.index(1).load(by_pair)[None, :]
        along_cos = bases.index(0).load(operand).to(gl.float32)
        along_sin = bases.index(1).load(operand).to(gl.float32)
        with_first = (along_cos * first + along_sin * second).to(factor.dtype)
        with_second = (along_cos * second - along_sin * first).to(factor.dtype)
        made = warpgroup_mma(with_first, factor.index(0), zeros, use_acc=False, is_async=True)
        made = warpgroup_mma(with_second, factor.index(1), made, is_async=True)
        made, with_first, with_second = warpgroup_mma_wait(0, deps=[made, with_first, with_second])
        # All warps have read the turned query and the factor.
        synchronize()
        last = head + 2 >= KV
        following = gl.where(last, WHICH, head + 2)
        wanted = gl.where(last & (more == 0), 0, rank)
        copy_halves(factor, up + following * WIDTH * up_stride, up_stride, wanted, WIDTH)
        prepared.index(head).store(unit_order(made, BITS).to(prepared.dtype))
    fence_async_shared()
    synchronize()
    mbarrier.arrive(ready, count=1)
    mbarrier.wait(ready, 1)
