"""Where a group's latents lie in memory: numbers of 16 bits, or units of codes, and of 3 bits bytes of a high plane.

A kind of latents is (BITS, COPY): COPY bytes are copied at once, of which all places in memory are multiples.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.fields import fields_of, planes_of


@gluon.jit
def row_at(latents, row, step, KIND: gl.constexpr):
    """A row's latents, `step` numbers or bytes behind those of the row before."""
    BITS: gl.constexpr = KIND[0]
    COPY: gl.constexpr = KIND[1]
    place = row * step
    if BITS < 16:
        place = gl.multiple_of(place, COPY)
    return latents + place


@gluon.jit
def planes_at(row, plane, offset, KIND: gl.constexpr):
    """Pointers to a row's first latent of a group, `offset` latents behind the first one, in every plane, a tuple.

    row: numbers, or bytes of codes; plane: bytes until the high plane.
    """
    BITS: gl.constexpr = KIND[0]
    COPY: gl.constexpr = KIND[1]
    UNITS: gl.constexpr = COPY // 2
    units = row.to(gl.pointer_type(gl.int16), bitcast=True) if BITS < 16 else row
    first = units + gl.multiple_of(offset // fields_of(BITS), UNITS)
    if COPY < 16:
        # Triton knows of a tensor's address only whether it is a multiple of 16.
        first = gl.multiple_of(first, COPY)
    result = (first,)
    if planes_of(BITS) == 2:
        high = row + gl.multiple_of(plane + offset // fields_of(BITS), COPY)
        result = result + (gl.multiple_of(high, COPY),)
    return result


@gluon.jit
def steps_of(row, KIND: gl.constexpr):
    """From a token's latents to the next one's in every plane, a tuple; row: numbers, or of codes bytes."""
    BITS: gl.constexpr = KIND[0]
    COPY: gl.constexpr = KIND[1]
    UNITS: gl.constexpr = COPY // 2
    if BITS == 16:
        result = (row,)
    else:
        units = gl.multiple_of(row // 2, UNITS)
        result = (units, 2 * units) if planes_of(BITS) == 2 else (units,)
    return result


@gluon.jit
def units_of(rank, KIND: gl.constexpr):
    """Numbers, or units, of so many latents, and bytes of the high plane."""
    BITS: gl.constexpr = KIND[0]
    COPY: gl.constexpr = KIND[1]
    # As many as bytes, where there is a plane of those.
    UNITS: gl.constexpr = COPY if planes_of(BITS) == 2 else COPY // 2
    return gl.multiple_of(rank // fields_of(BITS), UNITS)
