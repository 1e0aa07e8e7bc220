"""Slow pairs of keys with several queries, interpolated in windows of positions; the fast ones are rebuilt and turned.

As in `windows`, but of fewer slow pairs, whose cosines and sines take few columns: a product of a tile with

W_mq = sum_i (C_mi q1_i + S_mi q2_i) B_i + (C_mi q2_i - S_mi q1_i) B_{i+D/2}   (i: the slow pairs)

of every column m and query q, times P_m(s) and added up over m, is their share of the scores.
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

from palu.kernels.decode_attention.hopper.common import TILE, WARPS, synchronize
from palu.kernels.decode_attention.hopper.operands import kv_head_of
from palu.kernels.decode_attention.hopper.prologue import copy_halves
from palu.kernels.decode_attention.hopper.turns import LEAST, UNIT, unpacked
from palu.kernels.decode_attention.hopper.values import start_copies
from palu.kernels.latent_scores.tiles import turn


@gluon.jit
def load_slow(
    bases, frequencies, query, query_stride, result: gl.constexpr, KV: gl.constexpr, QUERIES: gl.constexpr,
    QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr, PLACE: gl.constexpr, ROWS: gl.constexpr, SLOTS: gl.constexpr,
    PAIRS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """What `slow_numbers` are made of: both numbers of the queries' slow pairs, C and S, frequencies.

    bases: fp16 [2, columns, pairs]. result: the layout of products with [columns * SLOTS, pairs] on the left.
    """
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, operand))
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, operand))
    kv_head, inside = kv_head_of(row % SLOTS, QUERY_SLOTS, TOGETHER, PLACE)
    there = (kv_head < KV) & (inside < QUERIES)
    dim = PAIRS + pair
    ok = there[:, None] & (dim < WIDTH // 2)[None, :]
    at = query + ((kv_head * QUERIES + inside) * query_stride)[:, None] + dim[None, :]
    first = gl.load(at, mask=ok, other=0.0)
    second = gl.load(at + WIDTH // 2, mask=ok, other=0.0)
    at_bases = bases + (row // SLOTS * PAIRS)[:, None] + pair[None, :]
    along_cos, along_sin = gl.load(at_bases), gl.load(at_bases + ROWS // SLOTS * PAIRS)
    # A pair a lane: cosines and sines are then exchanged.
    dim = PAIRS + gl.arange(0, PAIRS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    frequency = gl.load(frequencies + dim, mask=dim < WIDTH // 2, other=0.0)
    return first, second, along_cos, along_sin, frequency


@gluon.jit
def slow_numbers(
    loaded, scaling, position, QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr, PLACE: gl.constexpr,
    SLOTS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """What both numbers of slow pairs are multiplied with from the left, [columns * SLOTS, pairs], and each row's head.

    For the window that begins at a position. loaded: `load_slow`.
    """
    first, second, along_cos, along_sin, frequency = loaded
    row = gl.arange(0, first.shape[0], gl.SliceLayout(1, first.type.layout))
    kv_head, _ = kv_head_of(row % SLOTS, QUERY_SLOTS, TOGETHER, PLACE)
    cos, sin = turn(position.to(gl.float32) * frequency)
    by_pair: gl.constexpr = gl.SliceLayout(0, first.type.layout)
    cos, sin = gl.convert_layout(cos, by_pair), gl.convert_layout(sin, by_pair)
    first, second = first.to(gl.float32) * scaling, second.to(gl.float32) * scaling
    first, second = first * cos[None, :] + second * sin[None, :], second * cos[None, :] - first * sin[None, :]
    along_cos, along_sin = along_cos.to(gl.float32), along_sin.to(gl.float32)
    with_first = (along_cos * first + along_sin * second).to(DTYPE)
    with_second = (along_cos * second - along_sin * first).to(DTYPE)
    return with_first, with_second, kv_head


@gluon.constexpr_function
def sections_held(halves: int, kv: int) -> int:
    """Of how many sections slow pairs' factors of so many kv heads are in shared memory [halves, pairs, latents]."""
    return halves // (2 * kv)


@gluon.jit
def _copy_section(factor, source, KV: gl.constexpr, WIDTH: gl.constexpr, section: gl.constexpr, SECTIONS: gl.constexpr):
    """Start copying a section of all kv heads' slow pairs to its place, or to that of the last one; as `make_slow`."""
    up, up_stride, rank = source
    HELD: gl.constexpr = sections_held(factor.shape[0], KV)
    OF_GROUP: gl.constexpr = 2 * KV // len(rank)
    for group in gl.static_range(len(rank)):
        copy_halves(
            factor, up[group], up_stride, rank[group], factor.shape[1], section % HELD * (2 * KV), group * OF_GROUP,
            (group + 1) * OF_GROUP, WIDTH, True, section, SECTIONS,
        )  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def start_slow(factor, source, KV: gl.constexpr, WIDTH: gl.constexpr, SECTIONS: gl.constexpr):
    """Start copying the sections of slow pairs' factors that are held at a time, as `make_slow`: all, or the first."""
    for section in gl.static_range(sections_held(factor.shape[0], KV)):
        _copy_section(factor, source, KV, WIDTH, section, SECTIONS)


@gluon.constexpr_function
def _made_layout(latents: int) -> gl.NVMMADistributedLayout:
    """Of a section of a window's matrix of slow pairs, as it is made."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS.value, 1], [16, latents, 16])


@gluon.jit
def make_slow(
    prepared, factor, zero, numbers, source, PENDING: gl.constexpr, KV: gl.constexpr, WIDTH: gl.constexpr,
    SECTIONS: gl.constexpr,
):  # fmt: skip
    """W of all columns and slots, to shared memory [columns * SLOTS, latents], of `slow_numbers`.

    prepared: [units of every section, UNIT, latents], of which a section's last ones become W of each of the key
    groups, which has zeros in columns of other groups' heads. factor: [KV * 2 of all sections, or of one at a time,
    pairs, latents], both numbers of every kv head's slow pairs, on its way if not there; PENDING: groups of copies
    begun after it, where all are held. source: the up factor of every key group, its stride, and the groups' ranks.
    zero: in a loop, one that is not known before it, where else addresses would be computed.
    """
    with_first, with_second, kv_head = numbers
    GROUPS: gl.constexpr = len(source[2])
    UNITS: gl.constexpr = prepared.shape[0] // SECTIONS
    HELD: gl.constexpr = sections_held(factor.shape[0], KV)
    OF_GROUP: gl.constexpr = KV // GROUPS
    ROWS: gl.constexpr = prepared.shape[1]
    LATENTS: gl.constexpr = prepared.shape[2]
    nothing = gl.zeros([ROWS, LATENTS], gl.float32, _made_layout(LATENTS))
    for section in gl.static_range(SECTIONS):
        if section == 0 or HELD < SECTIONS:
            async_copy.wait_group(PENDING if HELD == SECTIONS else 0)
            fence_async_shared()
            synchronize()
        for group in gl.static_range(GROUPS):
            made = nothing
            for head in gl.static_range(group * OF_GROUP, (group + 1) * OF_GROUP):
                own = (kv_head == head)[:, None]
                own_first, own_second = gl.where(own, with_first, 0.0), gl.where(own, with_second, 0.0)
                half = zero + section % HELD * (2 * KV) + 2 * head
                begun = warpgroup_mma(own_first, factor.index(half), made, is_async=True)
                begun = warpgroup_mma(own_second, factor.index(half + 1), begun, is_async=True)
                made, own_first, own_second = warpgroup_mma_wait(0, deps=[begun, own_first, own_second])
            prepared.index((section + 1) * UNITS - GROUPS + group).store(made.to(prepared.dtype))
        if section + HELD < SECTIONS:
            # All warps have done their products.
            synchronize()
            _copy_section(factor, source, KV, WIDTH, section + HELD, SECTIONS)


@gluon.constexpr_function
def _of_scores(slots: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([3, 0], [WARPS.value, 1], [16, slots, 16])


@gluon.jit
def load_basis(basis, first, COLUMNS: gl.constexpr, SLOTS: gl.constexpr):
    """P of a tile's tokens, a tuple of words [tile] of two columns each, from token `first` of the window on."""
    token = first + gl.arange(0, TILE, gl.SliceLayout(1, _of_scores(SLOTS)))
    both = basis.to(gl.pointer_type(gl.int64), bitcast=True)
    result = ()
    for two in gl.static_range(COLUMNS // 4):
        words = gl.load(both + token * (COLUMNS // 4) + two)
        result = result + (words.to(gl.int32), (words >> 32).to(gl.int32))
    return result


@gluon.jit
def _halves(product):
    """The first and the second half of the columns."""
    WIDE: gl.constexpr = product.shape[1]
    low, high = gl.split(product.reshape([TILE, 2, WIDE // 2]).permute([0, 2, 1]))
    return low, high


@gluon.jit
def slow_scores(product, basis, SLOTS: gl.constexpr):
    """Scores [tile, SLOTS] of a product with W [tile, columns * SLOTS], as products with queries have them."""
    COLUMNS: gl.constexpr = 2 * len(basis)
    scores: gl.constexpr = _of_scores(SLOTS)
    # Column after column: neighbours in a row of the product are slots.
    parts = _halves(product)
    if COLUMNS >= 4:
        parts = _halves(parts[0]) + _halves(parts[1])
    if COLUMNS == 8:
        parts = _halves(parts[0]) + _halves(parts[1]) + _halves(parts[2]) + _halves(parts[3])
    total = gl.zeros([TILE, SLOTS], gl.float32, scores)
    for word in gl.static_range(COLUMNS // 2):
        even, odd = unpacked(basis[word])
        total += gl.convert_layout(parts[2 * word], scores, assert_trivial=True) * even[:, None]
        total += gl.convert_layout(parts[2 * word + 1], scores, assert_trivial=True) * odd[:, None]
    return total


@gluon.jit
def load_slow_of(
    factors, beside, bases, frequencies, query, query_stride, HEADS: gl.constexpr, WIDTH: gl.constexpr
):  # fmt: skip
    """What a window of slow pairs is made of; HEADS: what tells heads of slots: KV, QUERIES, QUERY_SLOTS, TOGETHER."""
    return load_slow(
        bases, frequencies, query, query_stride, _made_layout(factors.shape[2]), HEADS[0], HEADS[1], HEADS[2],
        HEADS[3], LEAST, UNIT, beside[0].shape[1], beside[1].shape[1], WIDTH,
    )  # fmt: skip


@gluon.jit
def make_first_window(
    factors, beside, rings, to_make, arguments, HEADS: gl.constexpr, WIDTH: gl.constexpr
):  # fmt: skip
    """Make the first window's matrix of slow pairs, whose scores are the last of a tile's, and start copying values.

    By the group of warps that weighs, which has nothing to weigh yet.
    """
    source, query, query_stride, scaling, bases, frequencies, position = to_make
    # Units of each section: one of every head, and what is made here of every key group.
    SECTIONS: gl.constexpr = factors.shape[0] // (HEADS[0] + len(source[2]))
    loaded = load_slow_of(factors, beside, bases, frequencies, query, query_stride, HEADS, WIDTH)
    start_slow(beside[1], source, HEADS[0], WIDTH, SECTIONS)
    STAYS: gl.constexpr = sections_held(beside[1].shape[0], HEADS[0]) == SECTIONS
    if STAYS:
        start_copies(rings, arguments, 0, 1)
    slow = slow_numbers(loaded, scaling, position, HEADS[2], HEADS[3], LEAST, beside[0].shape[1], factors.dtype)
    make_slow(factors, beside[1], 0, slow, source, rings[0].shape[0] - 1, HEADS[0], WIDTH, SECTIONS)
    if not STAYS:
        # Not before: copies are there in their order.
        start_copies(rings, arguments, 0, 1)
    fence_async_shared()
    synchronize()
    mbarrier.arrive(beside[2], count=1)
    # Else every round of the loop that follows begins with this.
    synchronize()
