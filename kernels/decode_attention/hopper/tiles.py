"""A tile's key latents: copied into shared memory, and from there to registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from palu.kernels.decode_attention.hopper.common import TILE, copy_rows, synchronize
from palu.kernels.decode_attention.hopper.operands import key_operand
from palu.kernels.decode_attention.hopper.parameters import scale_of, zero_of


@gluon.jit
def copy_tile(ring, stage, latents, tiles, index, latents_t, units):
    """Start copying a tile's latents, `units` numbers of 16 bits each; nothing is read behind the last tile.

    ring: shared memory [stages, tile, units] of every section of the latents, a tuple: else the compiler would let all
    warps wait for each other between their copies.
    """
    first, step, _, end, length = tiles
    until = gl.where(index < end, length, 0)
    WIDE: gl.constexpr = ring[0].shape[2]
    for section in gl.static_range(len(ring)):
        to, token = ring[section].index(stage), (first + index * step) * TILE
        copy_rows(to, latents, token, latents_t, until, section * WIDE, units, TILE, WIDE)
    async_copy.commit_group()


@gluon.jit
def loaded_of(
    ring, stage, parameters, GROUP: gl.constexpr, PENDING: gl.constexpr, result: gl.constexpr, BITS: gl.constexpr,
    ASYMMETRIC: gl.constexpr, TURNED: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """A tile's latents of a key group in registers, once they are there, and what their scores are multiplied with.

    As they are stored, a tuple of sections, with TURNED the last one first, their zero points and scales; and [tile].
    ring: as in `copy_tile`. PENDING: copies of latents that are under way, of which these are the first; SCALED: as in
    `key_operand`.
    """
    rows: gl.constexpr = gl.SliceLayout(1, result)
    async_copy.wait_group(PENDING - 1)
    synchronize()
    one = gl.full([TILE], 1.0, gl.float32, rows)
    scale = scale_of(parameters, GROUP, ASYMMETRIC) if BITS < 16 else one
    zero = zero_of(parameters, GROUP, rows, BITS, ASYMMETRIC)
    sections = ()
    for section in gl.static_range(len(ring)):
        slot = ring[len(ring) - 1 - section if TURNED else section].index(stage)
        sections = sections + (slot.load(gl.DotOperandLayout(0, result, 2)),)
    return (sections, zero, scale), one if SCALED else scale


@gluon.jit
def operand_of(
    loaded, section: gl.constexpr, BITS: gl.constexpr, TURNED: gl.constexpr, SCALED: gl.constexpr
):  # fmt: skip
    """A section of `loaded_of` as numbers; as `key_operand`."""
    return key_operand(loaded[0][section], loaded[1], loaded[2], BITS, TURNED, SCALED)
