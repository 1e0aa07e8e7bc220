"""A tile's key latents: copied into shared memory, and from there to registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from palu.kernels.decode_attention.hopper.common import TILE, copy_rows, synchronize
from palu.kernels.decode_attention.hopper.fields import planes_of
from palu.kernels.decode_attention.hopper.operands import high_bytes, key_operand
from palu.kernels.decode_attention.hopper.parameters import scale_of, zero_of


@gluon.jit
def copy_tile(ring, stage, latents, tiles, index, latents_t, units):
    """Start copying a tile's latents, `units` numbers, or units or bytes of a plane, each; none behind the last tile.

    ring: shared memory [stages, tile, units] of every section of the latents, plane after plane, a tuple: else the
    compiler would let all warps wait for each other between their copies. latents, latents_t: of every plane.
    """
    first, step, _, end, length = tiles
    until = gl.where(index < end, length, 0)
    WIDE: gl.constexpr = ring[0].shape[2]
    SECTIONS: gl.constexpr = len(ring) // len(latents)
    for piece in gl.static_range(len(ring)):
        to, token = ring[piece].index(stage), (first + index * step) * TILE
        copy_rows(
            to, latents[piece // SECTIONS], token, latents_t[piece // SECTIONS], until, piece % SECTIONS * WIDE, units,
            TILE, WIDE,
        )  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def _planes_of(ring, stage, section: gl.constexpr, operand: gl.constexpr, BITS: gl.constexpr):
    """A section of a tile's latents as stored, and bytes of the high plane, a tuple, or ()."""
    high = ()
    if planes_of(BITS) == 2:
        high = (high_bytes(ring[len(ring) // 2 + section].index(stage), operand),)
    return ring[section].index(stage).load(operand), high


@gluon.jit
def loaded_of(
    ring, stage, parameters, GROUP: gl.constexpr, PENDING: gl.constexpr, result: gl.constexpr, BITS: gl.constexpr,
    ASYMMETRIC: gl.constexpr, TURNED: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """A tile's latents of a key group in registers, once they are there, and what their scores are multiplied with.

    As they are stored, a tuple of sections, with TURNED the last one first, each with its high plane, a
    tuple of one or none, their zero points and scales; and [tile].
    ring: as in `copy_tile`. PENDING: copies of latents that are under way, of which these are the first; SCALED: as in
    `key_operand`.
    """
    rows: gl.constexpr = gl.SliceLayout(1, result)
    async_copy.wait_group(PENDING - 1)
    synchronize()
    one = gl.full([TILE], 1.0, gl.float32, rows)
    scale = scale_of(parameters, GROUP, ASYMMETRIC) if BITS < 16 else one
    zero = zero_of(parameters, GROUP, rows, BITS, ASYMMETRIC)
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    SECTIONS: gl.constexpr = len(ring) // planes_of(BITS)
    sections = ()
    for section in gl.static_range(SECTIONS):
        of_section = _planes_of(ring, stage, SECTIONS - 1 - section if TURNED else section, operand, BITS)
        sections = sections + (of_section,)
    return (sections, zero, scale), one if SCALED else scale


@gluon.jit
def operand_of(
    loaded, section: gl.constexpr, BITS: gl.constexpr, TURNED: gl.constexpr, SCALED: gl.constexpr
):  # fmt: skip
    """A section of `loaded_of` as numbers; as `key_operand`."""
    return key_operand(loaded[0][section][0], loaded[0][section][1], loaded[1], loaded[2], BITS, TURNED, SCALED)
