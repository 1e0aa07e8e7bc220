"""A tile's key latents: copied into shared memory, and from there to registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from palu.kernels.decode_attention.hopper.common import TILE, copy_rows, synchronize
from palu.kernels.decode_attention.hopper.operands import key_operand
from palu.kernels.decode_attention.hopper.parameters import scale_of, zero_of


@gluon.jit
def copy_tile(ring, stage, latents, tiles, index, latents_t, units, SECTIONS: gl.constexpr):
    """Start copying a tile's latents, `units` numbers of 16 bits each; nothing is read behind the last tile.

    ring: shared memory [stages * SECTIONS, tile, units of a section].
    """
    first, step, _, end, length = tiles
    until = gl.where(index < end, length, 0)
    for section in gl.static_range(SECTIONS):
        copy_rows(
            ring.index(stage * SECTIONS + section), latents, (first + index * step) * TILE, latents_t, until,
            section * ring.shape[2], units, TILE, ring.shape[2],
        )  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def operand_of(
    ring, stage, parameters, GROUP: gl.constexpr, PENDING: gl.constexpr, result: gl.constexpr, BITS: gl.constexpr,
    ASYMMETRIC: gl.constexpr, TURNED: gl.constexpr, SCALED: gl.constexpr, SECTIONS: gl.constexpr,
):  # fmt: skip
    """A tile's latents of a key group in registers, once they are there, and what their scores are multiplied with.

    A tuple of SECTIONS, with TURNED the last one first, and [tile]. ring: as in `copy_tile`. PENDING: copies of latents
    that are under way, of which these are the first; SCALED: as in `key_operand`.
    """
    rows: gl.constexpr = gl.SliceLayout(1, result)
    async_copy.wait_group(PENDING - 1)
    synchronize()
    one = gl.full([TILE], 1.0, gl.float32, rows)
    scale = scale_of(parameters, GROUP, ASYMMETRIC) if BITS < 16 else one
    zero = zero_of(parameters, GROUP, rows, BITS, ASYMMETRIC)
    operand = ()
    for section in gl.static_range(SECTIONS):
        slot = ring.index(stage * SECTIONS + (SECTIONS - 1 - section if TURNED else section))
        operand = operand + (key_operand(slot, zero, scale, result, BITS, TURNED, SCALED),)
    return operand, one if SCALED else scale
