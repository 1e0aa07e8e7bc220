"""Scores of products of a tile's latents, 64 columns after the other.

Two units' products are under way at a time: while the first one's numbers are looked at, the matrix units compute the
second.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from palu.kernels.decode_attention.hopper.common import TILE, reciprocal_root
from palu.kernels.decode_attention.hopper.products import (
    awaited_of,
    begun_of,
    bias_operands,
    hand_on,
    not_put_off,
    numbers_of,
    settled,
)
from palu.kernels.decode_attention.hopper.slow import slow_scores
from palu.kernels.decode_attention.hopper.turns import rotated, turns_of, weighed


@gluon.jit
def _with_inverse_root(factor, squares, place, epsilon, WIDTH: gl.constexpr, QUERY_SLOTS: gl.constexpr):
    """Factors [tile, columns] of scores, with those of a head's columns made of its keys' squares, added up [tile]."""
    layout: gl.constexpr = factor.type.layout
    column = gl.arange(0, factor.shape[1], gl.SliceLayout(0, layout))
    inverse = reciprocal_root(squares * (1.0 / WIDTH) + epsilon)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, layout), assert_trivial=True)
    return gl.where((column // QUERY_SLOTS == place)[None, :], inverse[:, None], factor)


@gluon.jit
def _hand_on_head(
    found, free, scores, factor, squares, norm, unit, seen, scale, logarithm, OF_HEAD: gl.constexpr,
    TOGETHER: gl.constexpr, QUERY_SLOTS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Store a place's scores once a unit ends a head of it, whose squares are added up; returns the place's factors."""
    head = unit // OF_HEAD
    if len(norm) == 2:
        factor = _with_inverse_root(factor, squares, head % TOGETHER, norm[1], WIDTH, QUERY_SLOTS)
    mbarrier.wait(free[0], free[1])
    hand_on(found[0].index(found[1] + head // TOGETHER), scores * factor, seen, scale, logarithm)
    return factor


@gluon.jit
def _times_weights(product, norm, unit):
    """Rebuilt keys times a norm's weights, and their squares added up, [tile]; without a norm as they are."""
    squares = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, product.type.layout))
    if len(norm) == 2:
        squares = gl.sum(product * product, 1)
        product *= norm[0].index(unit).load(gl.SliceLayout(0, product.type.layout))[None, :]
    return product, squares


@gluon.jit
def _met(turned, queries, unit, scores, OF_PLACE: gl.constexpr, MODE: gl.constexpr):
    """The product of turned keys with the queries, under way: a place's first one, or added to the scores."""
    added = True if MODE == "mixed" else unit % OF_PLACE > 0
    return warpgroup_mma(turned, queries.index(unit).permute((1, 0)), scores, use_acc=added, is_async=True)


@gluon.jit
def _two_begun(operand, factors, first, biases, SUMS: gl.constexpr, HOW: gl.constexpr = None):
    """Products of two neighbouring units under way, the operand, and `bias_operands` of both; as `begun_of`."""
    # Before any product is under way.
    bias, other_bias = bias_operands(biases, first), bias_operands(biases, first + 1)
    product, operand = begun_of(operand, factors, first, bias, SUMS, HOW)
    other, operand = begun_of(operand, factors, first + 1, other_bias, SUMS)
    return product, other, operand, bias, other_bias


@gluon.jit
def _score_two(
    found, free, two, queries, norm, words, scores, factor, first, seen,
    scale, logarithm, narrow: gl.constexpr, OF_HEAD: gl.constexpr, TOGETHER: gl.constexpr, QUERY_SLOTS: gl.constexpr,
    WIDTH: gl.constexpr, MODE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Scores of two units, `_two_begun`; as `score_turned`, with the factor and the operand."""
    product, other, operand, bias, other_bias = two
    # Scores of several kv heads add up, in columns of their own.
    OF_PLACE: gl.constexpr = OF_HEAD * TOGETHER
    SECTIONS: gl.constexpr = len(operand)
    # Of the other unit, products with sections of latents and with ones are under way.
    if len(bias) > 0:
        product, _ones = warpgroup_mma_wait(SECTIONS + 1, deps=[product, bias[0]])
    else:
        product = warpgroup_mma_wait(SECTIONS, deps=[product])
    product, squares = _times_weights(product, norm, 0)
    turned = rotated(product, words[0], narrow, DTYPE)
    scores = _met(turned, queries, first, scores, OF_PLACE, MODE)
    # The second one's turning goes on beside the first one's product with the queries.
    if len(bias) > 0:
        other, _ones = warpgroup_mma_wait(1, deps=[other, other_bias[0]])
    else:
        other = warpgroup_mma_wait(1, deps=[other])
    if MODE == "rotated" and OF_HEAD == 1:
        scores, turned = warpgroup_mma_wait(0, deps=[scores, turned])
        factor = _hand_on_head(
            found, free, scores, factor, squares, norm, first, seen, scale, logarithm,
            OF_HEAD, TOGETHER, QUERY_SLOTS, WIDTH,
        )  # fmt: skip
    other, others = _times_weights(other, norm, OF_HEAD - 1)
    following = settled(rotated(other, words[OF_HEAD - 1], narrow, DTYPE))
    # No wait: products that add to the same numbers go on in their order.
    scores = _met(following, queries, first + 1, scores, OF_PLACE, MODE)
    awaited, operand = awaited_of((scores, turned, following), operand)
    scores, turned, following = awaited
    if MODE == "rotated":
        squares = others if OF_HEAD == 1 else squares + others
        factor = _hand_on_head(
            found, free, scores, factor, squares, norm, first + 1, seen, scale, logarithm,
            OF_HEAD, TOGETHER, QUERY_SLOTS, WIDTH,
        )  # fmt: skip
    return scores, factor, operand


@gluon.jit
def score_turned(
    found, free, loaded, factors, queries, biases, norm, words, scores, seen, scale, logarithm, narrow: gl.constexpr,
    begin, UNITS: gl.constexpr, KV: gl.constexpr, TOGETHER: gl.constexpr, QUERY_SLOTS: gl.constexpr,
    WIDTH: gl.constexpr, MODE: gl.constexpr, DTYPE: gl.constexpr, HOW: gl.constexpr,
):  # fmt: skip
    """Scores of keys that are rebuilt and turned, unit after unit, while the next one's product is under way.

    Of a key group's KV heads, which have UNITS units from `begin` on. found: shared memory of places of scores, and the
    tile's first one. biases: shared memory of `store_biases`, in a tuple, or (). norm: weights of a key norm and what
    is added to the mean square, or (). In mixed mode scores are added to `scores` and returned, to go to `with_slow`,
    with the operand.
    """
    OF_HEAD: gl.constexpr = UNITS // KV
    OF_PLACE: gl.constexpr = OF_HEAD * TOGETHER
    # Keys of 16 bits are rounded anyway: rounding their sums as well takes no instructions and half of the registers.
    # The block of a factor's first latent, the largest one, is added last (`last_first`): little is lost before.
    SUMS: gl.constexpr = gl.float16 if gl.float16 == DTYPE and len(norm) == 0 else gl.float32
    # Registers of products have to be written before any is under way.
    scores = settled(scores)
    factor = gl.full([TILE, scores.shape[1]], 1.0, gl.float32, narrow)
    last = begin + UNITS - 1
    if UNITS == 2:
        two = _two_begun(loaded, factors, begin, biases, SUMS, HOW)
        scores, factor, operand = _score_two(
            found, free, two, queries, norm, words, scores, factor, begin, seen, scale, logarithm, narrow,
            OF_HEAD, TOGETHER, QUERY_SLOTS, WIDTH, MODE, DTYPE,
        )  # fmt: skip
    else:
        operand = numbers_of(loaded, HOW)
        for first in range(begin, last, 2):
            two = _two_begun(operand, factors, first, biases, SUMS)
            scores, factor, operand = _score_two(
                found, free, two, queries, norm, words, scores, factor, first, seen, scale, logarithm, narrow,
                OF_HEAD, TOGETHER, QUERY_SLOTS, WIDTH, MODE, DTYPE,
            )  # fmt: skip
    if UNITS % 2 == 1:
        begun, operand = begun_of(operand, factors, last, bias_operands(biases, last), SUMS)
        awaited, operand = awaited_of((begun,), operand)
        product = awaited[0]
        product, squares = _times_weights(product, norm, 0)
        turned = rotated(product, words[0], narrow, DTYPE)
        scores = _met(turned, queries, last, scores, OF_PLACE, MODE)
        scores, turned = warpgroup_mma_wait(0, deps=[scores, turned])
        if MODE == "rotated":
            _hand_on_head(
                found, free, scores, factor, squares, norm, last, seen, scale, logarithm,
                OF_HEAD, TOGETHER, QUERY_SLOTS, WIDTH,
            )  # fmt: skip
    return scores, operand


@gluon.jit
def with_slow(operand, factors, shares, scores, unit):
    """Scores of `score_turned`, with those of slow pairs, whose matrix a unit is."""
    begun, operand = begun_of(operand, factors, unit, (), gl.float32)
    awaited, operand = awaited_of((begun,), operand)
    product = awaited[0]
    return scores + slow_scores(product, shares, scores.shape[1])


@gluon.jit
def hand_on_slow(found, free, scores, seen, scales, logarithm):
    """Store scores of `with_slow`; scales: of every key group, whose heads have neighbouring columns."""
    scale = scales[0]
    if len(scales) > 1:
        layout: gl.constexpr = scores.type.layout
        group = gl.arange(0, scores.shape[1], gl.SliceLayout(0, layout)) // (scores.shape[1] // len(scales))
        factor = gl.full([TILE, scores.shape[1]], 1.0, gl.float32, layout)
        for which in gl.static_range(len(scales)):
            own = gl.convert_layout(scales[which], gl.SliceLayout(1, layout), assert_trivial=True)
            factor = gl.where((group == which)[None, :], own[:, None], factor)
        scores *= factor
        scale = gl.full([TILE], 1.0, gl.float32, gl.SliceLayout(1, layout))
    mbarrier.wait(free[0], free[1])
    hand_on(found[0].index(found[1]), scores, seen, scale, logarithm)


@gluon.jit
def _weigh(product, words, sums, HEADS: gl.constexpr):
    """Scores of a unit's products, added to others, as `weighed` leaves them."""
    layout: gl.constexpr = product.type.layout
    cos, sin = turns_of(words, layout, HEADS)
    return settled(sums + weighed(product, cos, sin, HEADS))


@gluon.jit
def _weigh_two(found, free, two, words, first, seen, scale, logarithm, HEADS: gl.constexpr):
    """Scores of two units, `_two_begun`; as `score_weighed`, with the operand."""
    product, other, operand, _bias, _other_bias = two
    # A head of 64 has one unit.
    if len(words) == 1:
        awaited, operand = awaited_of((product, other), operand)
        product, other = awaited
        score = gl.sum(_weigh(product, words[0], 0.0, HEADS), 2)
        score = gl.join(score, gl.sum(_weigh(other, words[0], 0.0, HEADS), 2)).reshape([TILE, 2])
    else:
        sums = not_put_off(_weigh(warpgroup_mma_wait(len(operand), deps=[product]), words[0], 0.0, HEADS))
        awaited, operand = awaited_of((other,), operand)
        other = awaited[0]
        score = gl.sum(_weigh(other, words[1], sums, HEADS), 2)
    mbarrier.wait(free[0], free[1])
    hand_on(found[0].index(found[1] + first // 2), score, seen, scale, logarithm)
    return operand


@gluon.jit
def score_weighed(
    found, free, loaded, factors, words, seen, scale, logarithm,
    begin, TOTAL: gl.constexpr, MODE: gl.constexpr, HOW: gl.constexpr,
):  # fmt: skip
    """Scores of products with folded factors, or with a window's, unit after unit, as in `score_turned`.

    Of a key group's heads: TOTAL units from `begin` on, of which only the program's last one may be alone. words: of
    the units of a head; of windows, of fast pairs and of slow ones, which two heads share.
    """
    HEADS: gl.constexpr = 2 if MODE == "windows" else 1
    last = begin + TOTAL - 1
    if TOTAL == 2:
        two = _two_begun(loaded, factors, begin, (), gl.float32, HOW)
        operand = _weigh_two(found, free, two, words, begin, seen, scale, logarithm, HEADS)
    else:
        operand = numbers_of(loaded, HOW)
        for first in range(begin, last, 2):
            two = _two_begun(operand, factors, first, (), gl.float32)
            operand = _weigh_two(found, free, two, words, first, seen, scale, logarithm, HEADS)
    if TOTAL % 2 == 1:
        begun, operand = begun_of(operand, factors, last, (), gl.float32)
        awaited, operand = awaited_of((begun,), operand)
        product = awaited[0]
        score = gl.sum(_weigh(product, words[0], 0.0, HEADS), 2)
        mbarrier.wait(free[0], free[1])
        hand_on(found[0].index(found[1] + last // 2), gl.join(score, score).reshape([TILE, 2]), seen, scale, logarithm)
