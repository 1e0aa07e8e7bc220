"""Windows of positions: what latents are multiplied with there instead of slow pairs' a and b.

Inside a window of positions t0 + s the cosines and sines of all but the fastest pairs are few columns' combinations,
[cos(s w), sin(s w)] ~ P(s) [C, S]. So their share of q . RoPE_t(B x) = sum_m P_m(s) (W_m . x), made once per window
and head of

W_m = sum_i (C_mi q1_i + S_mi q2_i) B_i + (C_mi q2_i - S_mi q1_i) B_{i+D/2},

q1, q2: the query's pairs turned back to the window's first position. Columns of two heads lie side by side.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from palu.kernels.decode_attention.hopper.common import WARPS, bits_of, hand_over, synchronize
from palu.kernels.decode_attention.hopper.prologue import copy_halves, of_head, there_if
from palu.kernels.decode_attention.hopper.turns import UNIT
from palu.kernels.latent_scores.tiles import turn

# The fastest pairs, which stay exact, and room for the others, in two pieces.
FAST: gl.constexpr = gl.constexpr(16)
PIECES: gl.constexpr = gl.constexpr((32, 16))
SLOW: gl.constexpr = gl.constexpr(48)
# Slow pairs' columns of a head.
COLUMNS: gl.constexpr = gl.constexpr(32)
# Threads' places for pairs of two heads.
_PAIRS: gl.constexpr = gl.constexpr(64)
_OF_PAIRS: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [2, 2], [1, 0]))


@gluon.constexpr_function
def _columns_layout(pairs: int) -> gl.DistributedLinearLayout:
    """Two heads' columns and pairs [2, COLUMNS, pairs] as the left side of a product of 64 rows has them."""
    held = [[0, 0, 8 << bit] for bit in range(bits_of(pairs) - 3)]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 8, 0], *held], lanes, [[0, 16, 0], [1, 0, 0]], [], [2, COLUMNS.value, pairs]
    )


@gluon.constexpr_function
def makers_of(kv: int) -> int:
    """Groups of warps that make windows of a head: each has every other two heads, or parts of one or two heads'."""
    return 1 if kv > 2 else 2


@gluon.constexpr_function
def first_of(kv: int, which: int) -> int:
    """The first kv head of which a group of warps makes windows."""
    return 2 * which if makers_of(kv) == 1 else 0


@gluon.constexpr_function
def parts_of_latents(kv: int, sections: int) -> int:
    """In how many parts windows' latents are made, of which every one that makes them has every n-th."""
    return max(makers_of(kv), sections)


@gluon.constexpr_function
def own_parts(kv: int, sections: int) -> int:
    """Parts of the latents at most that a group of warps makes."""
    return -(-parts_of_latents(kv, sections) // makers_of(kv))


@gluon.jit
def copy_slow(
    held, up, up_stride, rank, first: gl.constexpr, HEADS: gl.constexpr, KV: gl.constexpr, WIDTH: gl.constexpr,
    WHICH: gl.constexpr, SECTIONS: gl.constexpr,
):  # fmt: skip
    """Start copying slow pairs of the factors of HEADS kv heads from head `first` on, one or two of a key group.

    Of the group's own parts of the latents. up, rank: as in `copy_factors`.
    """
    # Without a head anything.
    own: gl.constexpr = min(first, KV - 1)
    at, latents = of_head(up, own, KV) + first * WIDTH * up_stride, of_head(rank, own, KV)
    PARTS: gl.constexpr = parts_of_latents(KV, SECTIONS)
    HALVES: gl.constexpr = held[0].shape[0] // own_parts(KV, SECTIONS)
    MAKERS: gl.constexpr = makers_of(KV)
    for part in gl.static_range(WHICH % MAKERS, PARTS, MAKERS):
        for piece in gl.static_range(2):
            copy_halves(
                held[piece], at, up_stride, latents, FAST + piece * PIECES[0], part // MAKERS * HALVES, 0, 2 * HEADS,
                WIDTH, False, part, PARTS,
            )  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def load_frequencies(frequencies, WIDTH: gl.constexpr):
    """Frequencies of the slow pairs."""
    pair = FAST + gl.arange(0, _PAIRS, gl.SliceLayout(0, _OF_PAIRS))
    return gl.load(frequencies + pair, mask=pair < WIDTH // 2, other=0.0)


@gluon.jit
def load_own_queries(query, query_stride, scaling, KV: gl.constexpr, WIDTH: gl.constexpr, WHICH: gl.constexpr):
    """Both numbers of slow pairs of the queries of heads that a group makes windows of, float32 [2, pairs] each."""
    inside = gl.arange(0, 2, gl.SliceLayout(1, _OF_PAIRS))
    pair = FAST + gl.arange(0, _PAIRS, gl.SliceLayout(0, _OF_PAIRS))
    result = ()
    for head in gl.static_range(first_of(KV, WHICH), KV, 4):
        ok = (head + inside < KV)[:, None] & (pair < WIDTH // 2)[None, :]
        at = query + ((head + inside) * query_stride)[:, None] + pair[None, :]
        first = gl.load(at, mask=ok, other=0.0).to(gl.float32) * scaling
        second = gl.load(at + WIDTH // 2, mask=ok, other=0.0).to(gl.float32) * scaling
        result = result + (first, second)
    return result


@gluon.jit
def _store_turned(turned, own, angle):
    """Queries, turned back by angles [pairs], to shared memory [numbers of pairs of heads, 2, pairs]."""
    cos, sin = turn(angle)
    for at in gl.static_range(0, len(own), 2):
        turned.index(at).store((own[at] * cos[None, :] + own[at + 1] * sin[None, :]).to(turned.dtype))
        turned.index(at + 1).store((own[at + 1] * cos[None, :] - own[at] * sin[None, :]).to(turned.dtype))


@gluon.jit
def _load_bases(bases, FIRST: gl.constexpr, PAIRS: gl.constexpr):
    """C and S of some pairs, fp16 [COLUMNS, pairs] each."""
    layout: gl.constexpr = gl.SliceLayout(0, _columns_layout(PAIRS))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, layout))
    pair = FIRST + gl.arange(0, PAIRS, gl.SliceLayout(0, layout))
    at = bases + (column * SLOW)[:, None] + pair[None, :]
    return gl.load(at), gl.load(at + COLUMNS * SLOW)


@gluon.jit
def _with_queries(
    along_cos, along_sin, first, second, FIRST: gl.constexpr, result: gl.constexpr, DTYPE: gl.constexpr
):  # fmt: skip
    """What two heads' factors are multiplied with from the left, for both numbers of the pairs, [64, pairs]."""
    PAIRS: gl.constexpr = along_cos.shape[1]
    SHAPE: gl.constexpr = [2, COLUMNS, PAIRS]
    by_head: gl.constexpr = gl.SliceLayout(1, _columns_layout(PAIRS))
    first = first.slice(FIRST, PAIRS, dim=1).load(by_head)[:, None, :].broadcast_to(SHAPE)
    second = second.slice(FIRST, PAIRS, dim=1).load(by_head)[:, None, :].broadcast_to(SHAPE)
    along_cos = along_cos[None, :, :].broadcast_to(SHAPE)
    along_sin = along_sin[None, :, :].broadcast_to(SHAPE)
    with_first, with_second = gl.inline_asm_elementwise(
        "{ .reg .b32 other; mul.rn.f16x2 other, $3, $5; fma.rn.f16x2 $0, $2, $4, other; mul.rn.f16x2 other, $3, $4; "
        "neg.f16x2 other, other; fma.rn.f16x2 $1, $2, $5, other; }",
        "=&r,=&r,r,r,r,r", [along_cos, along_sin, first, second], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    with_first = gl.convert_layout(with_first.reshape([UNIT, PAIRS]), operand, assert_trivial=True)
    with_second = gl.convert_layout(with_second.reshape([UNIT, PAIRS]), operand, assert_trivial=True)
    return with_first.to(DTYPE), with_second.to(DTYPE)


@gluon.jit
def _of_head(numbers, inside: gl.constexpr):
    """Rows of one of two heads, zero in those of the other."""
    row = gl.arange(0, UNIT, gl.SliceLayout(1, numbers.type.layout))
    return gl.where((row // COLUMNS == inside)[:, None], numbers, 0.0)


@gluon.jit
def _multiplied(made, left, held, half: gl.constexpr, inside: gl.constexpr, HALVES: gl.constexpr):
    """A head's products, of each part of the latents, added to what the other one's gave.

    left: of both pieces, with first and second numbers.
    """
    first, second = _of_head(left[0], inside), _of_head(left[1], inside)
    more_first, more_second = _of_head(left[2], inside), _of_head(left[3], inside)
    done = ()
    for part in gl.static_range(len(made)):
        at = part * HALVES + half
        begun = warpgroup_mma(first, held[0].index(at), made[part], use_acc=inside > 0, is_async=True)
        begun = warpgroup_mma(second, held[0].index(at + 1), begun, is_async=True)
        begun = warpgroup_mma(more_first, held[1].index(at), begun, is_async=True)
        begun = warpgroup_mma(more_second, held[1].index(at + 1), begun, is_async=True)
        begun, first, second, more_first, more_second = warpgroup_mma_wait(
            0, deps=[begun, first, second, more_first, more_second]
        )
        done = done + (begun,)
    return done


@gluon.jit
def _copy_following(
    held, up, up_stride, rank, more, head: gl.constexpr, KV: gl.constexpr, WIDTH: gl.constexpr, WHICH: gl.constexpr,
    SECTIONS: gl.constexpr,
):  # fmt: skip
    """Start copying what the next of every other two heads needs, or the first one where there are more windows."""
    NEXT: gl.constexpr = head + 1 if head % 2 == 0 and head + 1 < KV else head // 2 * 2 + 4
    if NEXT < KV:
        copy_slow(held, up, up_stride, rank, NEXT, 1, KV, WIDTH, WHICH, SECTIONS)
    else:
        copy_slow(
            held, up, up_stride, there_if(more != 0, rank), first_of(KV, WHICH), 1, KV, WIDTH, WHICH, SECTIONS
        )  # fmt: skip


@gluon.jit
def make_window(
    prepared, beside, ready, frequency, own, bases, up, arguments, position, more,
    KV: gl.constexpr, WIDTH: gl.constexpr, WHICH: gl.constexpr, SECTIONS: gl.constexpr,
):  # fmt: skip
    """W of every other two kv heads, to shared memory [2 * pairs of heads, UNIT, latents] of every section.

    To every second unit, for the window that begins at a position; of one or two heads, of every other part of the
    latents. own: `load_own_queries`. arguments: the up factor's stride, and ranks as in `copy_factors`. beside: shared
    memory for slow pairs of factors, of a head, the first one on its way, which it will be again where there are more
    windows, or of two, which stay; and for the turned queries. ready: two groups of warps arrive when they need the
    last window no more.
    """
    held, turned = beside
    up_stride, rank = arguments
    OWN: gl.constexpr = own_parts(KV, SECTIONS)
    STAYS: gl.constexpr = held[0].shape[0] == 4 * OWN
    LATENTS: gl.constexpr = held[0].shape[2]
    WIDE: gl.constexpr = prepared.shape[2]
    PARTS: gl.constexpr = parts_of_latents(KV, SECTIONS)
    FIRST: gl.constexpr = first_of(KV, WHICH)
    MAKERS: gl.constexpr = makers_of(KV)
    FIRST_PART: gl.constexpr = WHICH % MAKERS
    MANY: gl.constexpr = (PARTS - FIRST_PART + MAKERS - 1) // MAKERS
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, LATENTS, 16])
    along = _load_bases(bases, 0, PIECES[0]) + _load_bases(bases, PIECES[0], PIECES[1])
    _store_turned(turned, own, position.to(gl.float32) * frequency)
    # What was copied is there, and all warps have done their products with the last window.
    async_copy.wait_group(0)
    hand_over(ready, 0)
    for head in gl.static_range(FIRST, KV, 4):
        first, second = turned.index((head - FIRST) // 2), turned.index((head - FIRST) // 2 + 1)
        left = _with_queries(along[0], along[1], first, second, 0, result, prepared.dtype)
        left = left + _with_queries(along[2], along[3], first, second, PIECES[0], result, prepared.dtype)
        made = (gl.zeros([UNIT, LATENTS], gl.float32, result),) * MANY
        for inside in gl.static_range(min(2, KV - head)):
            if not STAYS:
                # Of another head than the first, the factor has to arrive.
                async_copy.wait_group(0)
                fence_async_shared()
                synchronize()
            made = _multiplied(made, left, held, 2 * inside if STAYS else 0, inside, held[0].shape[0] // OWN)
            if not STAYS:
                # All warps have read the factor.
                synchronize()
                _copy_following(held, up, up_stride, rank, more, head + inside, KV, WIDTH, WHICH, SECTIONS)
        for part in gl.static_range(FIRST_PART, PARTS, MAKERS):
            to = prepared.index(part * LATENTS // WIDE * (prepared.shape[0] // SECTIONS) + head + 1)
            if LATENTS < WIDE:
                to = to.slice(part * LATENTS % WIDE, LATENTS, dim=1)
            to.store(made[part // MAKERS].to(prepared.dtype))
