"""Scales and zero points of a tile's codes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.common import TILE, log2, phase_of, reciprocal
from palu.kernels.decode_attention.hopper.operands import taken_away, taken_of_numbers

# Which of a tile's parameters are the values': the last ones.
VALUES: gl.constexpr = gl.constexpr(-1)


@gluon.jit
def _words(at, ok, ASYMMETRIC: gl.constexpr):
    """Scales of some tokens, with the zero points where there are any."""
    if ASYMMETRIC:
        at = at.to(gl.pointer_type(gl.int32), bitcast=True)
    # Behind the last token any positive scale does.
    return gl.load(at, mask=ok, other=0x3C00 if ASYMMETRIC else 1.0)


@gluon.jit
def load_parameters(stored, tiles, index, layout: gl.constexpr, BITS: gl.constexpr, ASYMMETRIC: gl.constexpr):
    """Scales of a tile's keys, of every key group, and of its values, [tile] each, as words with any zero points.

    stored: where they are of every key group, a tuple, and of the values, and from a token to the next one.
    """
    parameters = ()
    if BITS < 16:
        keys, values, keys_t, values_t = stored
        first, step, _, _, length = tiles
        token = (first + index * step) * TILE + gl.arange(0, TILE, layout)
        for group in gl.static_range(len(keys)):
            parameters = parameters + (_words(keys[group] + token * keys_t, token < length, ASYMMETRIC),)
        parameters = parameters + (_words(values + token * values_t, token < length, ASYMMETRIC),)
    return parameters


@gluon.jit
def _half(word):
    return word.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def scale_of(parameters, side: gl.constexpr, ASYMMETRIC: gl.constexpr):
    """A tile's scales, float32 [tile], of a key group or of VALUES."""
    return _half(parameters[side]) if ASYMMETRIC else parameters[side].to(gl.float32)


@gluon.jit
def zeros_of(parameters, layout: gl.constexpr, BITS: gl.constexpr, ASYMMETRIC: gl.constexpr):
    """Zeros [tile] that are known when a tile's key scales are.

    A load that waits for them keeps apart from the parameters' ones: where both are under way, the first use of either
    waits for all.
    """
    zeros = gl.zeros([TILE], gl.int32, layout)
    if BITS < 16:
        # Visible tokens' scales are positive; what others' loads read is not used.
        zeros = (scale_of(parameters, 0, ASYMMETRIC) < 0.0).to(gl.int32)
    return zeros


@gluon.jit
def zero_of(parameters, side: gl.constexpr, layout: gl.constexpr, BITS: gl.constexpr, ASYMMETRIC: gl.constexpr):
    """A tile's zero points, float32 [tile], of a key group or of VALUES; where there are none, the middle code."""
    if BITS < 16 and ASYMMETRIC:
        zero = _half(parameters[side] >> 16)
    else:
        zero = gl.full([TILE], float(1 << (BITS - 1)), gl.float32, layout)
    return zero


@gluon.jit
def _visible_scale(parameters, seen, ASYMMETRIC: gl.constexpr):
    """Scales of a tile's values; those of hidden tokens may be anything, zero where a cache has room left, so one."""
    return gl.where(seen > float("-inf"), scale_of(parameters, VALUES, ASYMMETRIC), 1.0)


@gluon.jit
def logarithm_of(parameters, seen, layout: gl.constexpr, BITS: gl.constexpr, ASYMMETRIC: gl.constexpr):
    """The logarithm of the scales of a tile's values, zero of numbers."""
    logarithm = gl.zeros([TILE], gl.float32, layout)
    if BITS < 16:
        logarithm = log2(_visible_scale(parameters, seen, ASYMMETRIC))
    return logarithm


@gluon.jit
def place_of_scales(WHICH: gl.constexpr, done, EITHER: gl.constexpr):
    """Where the scales are of tiles that have a buffer of scores (`buffer_in`), which is free again before they are."""
    return 2 * phase_of(done, EITHER) + (done % 2 if EITHER else WHICH)


@gluon.jit
def hand_on_parameters(
    scales, place, parameters, seen, layout: gl.constexpr, BITS: gl.constexpr, ASYMMETRIC: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Store what weights need of a tile's values: 1 / scale, and what their numbers have more than latents / scale.

    place: `place_of_scales`; BITS: of the values; WHOLE: numbers are those of `bytes_operand`, else of `value_operand`.
    """
    if BITS < 16:
        scales[0].index(place).store(reciprocal(_visible_scale(parameters, seen, ASYMMETRIC)))
        shift = zero_of(parameters, VALUES, layout, BITS, ASYMMETRIC)
        shift -= taken_away(BITS) if WHOLE else taken_of_numbers(gl.arange(0, TILE, layout), BITS)
        scales[1].index(place).store(gl.where(seen > float("-inf"), shift, 0.0))
