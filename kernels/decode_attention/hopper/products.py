"""Products of a tile's latents with columns of the factor, under way, and what is done so that they stay so.

The compiler makes products wait for each other where their registers are written or read by other instructions
meanwhile, or where they stay under way from one round of a loop to the next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from palu.kernels.decode_attention.hopper.common import TILE, WARPS
from palu.kernels.decode_attention.hopper.tiles import operand_of
from palu.kernels.decode_attention.hopper.turns import UNIT
from palu.kernels.latent_scores.tiles import LOG2_E


@gluon.jit
def hand_on(to, score, seen, scale, logarithm):
    """Store a tile's scores [tile, columns], minus infinity where tokens are hidden; seen: what is added to them."""
    rows: gl.constexpr = gl.SliceLayout(1, score.type.layout)
    added = gl.convert_layout(seen, rows, assert_trivial=True)
    scale = gl.convert_layout(scale, rows, assert_trivial=True)[:, None]
    # Scores of hidden tokens may be anything.
    hidden = (added == float("-inf"))[:, None]
    added = added * LOG2_E + gl.convert_layout(logarithm, rows, assert_trivial=True)
    to.store(gl.where(hidden, float("-inf"), score * scale + added[:, None]))


@gluon.jit
def settled(numbers):
    """The same numbers, computed before any product that is begun after this."""
    if numbers.dtype == gl.float32:
        numbers = gl.inline_asm_elementwise("", "=f,0", [numbers], dtype=gl.float32, is_pure=False, pack=1)
    elif numbers.dtype == gl.float16:
        numbers = gl.inline_asm_elementwise("", "=r,0", [numbers], dtype=gl.float16, is_pure=False, pack=2)
    else:
        numbers = gl.inline_asm_elementwise("", "=r,0", [numbers], dtype=gl.bfloat16, is_pure=False, pack=2)
    return numbers


@gluon.jit
def not_put_off(numbers):
    """The same numbers, float32, computed before the next wait for products, which the assembler puts first else.

    An event of a counter (`pmevent`) would be raised if their bits were a constant, which changes nothing; but the
    assembler cannot know that they never are.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred odd; .reg .b32 any; or.b32 any, $2, $3; setp.eq.u32 odd, any, 0x7f812345; @odd pmevent 1; "
        "mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=r,=r,r,r", [numbers], dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def bias_operands(biases, unit):
    """Ones in a unit's columns of biases [tile, columns], for a product, and the biases; () where there are none."""
    both = ()
    if len(biases) > 0:
        product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, UNIT, 16])
        operand: gl.constexpr = gl.DotOperandLayout(0, product, 2)
        COLUMNS: gl.constexpr = biases[0].shape[1]
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, operand))
        ones = gl.full([TILE, COLUMNS], 1.0, gl.float32, operand)
        both = (settled(gl.where((column // 2 == unit)[None, :], ones, 0.0).to(biases[0].dtype)), biases[0])
    return both


@gluon.jit
def _with_bias(begun, bias):
    """A unit's product with its biases, `bias_operands`, under way."""
    if len(bias) == 2:
        # Last, so that sums are small before it, which are rounded where they have 16 bits.
        begun = warpgroup_mma(bias[0], bias[1].permute((1, 0)), begun, is_async=True)
    return begun


@gluon.jit
def numbers_of(loaded, HOW: gl.constexpr):
    """All sections of `loaded_of` as numbers; HOW: what `operand_of` takes last, in its order."""
    operand = ()
    for section in gl.static_range(len(loaded[0])):
        operand = operand + (operand_of(loaded, section, HOW[0], HOW[1], HOW[2]),)
    return operand


@gluon.jit
def begun_of(operand, factors, unit, bias, SUMS: gl.constexpr, HOW: gl.constexpr = None):
    """The product of a tile's latents with a unit's columns, under way: as many as there are sections; and the operand.

    operand: `numbers_of`, or with its HOW what that takes: then numbers of a section are made while the last one's
    product is under way. factors: units of the first section, then those of the next one. bias: `bias_operands`, which
    are added, or (). SUMS: the type of its numbers.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, UNIT, 16])
    begun = gl.zeros([TILE, UNIT], SUMS, layout)
    SECTIONS: gl.constexpr = len(operand) if HOW is None else len(operand[0])
    UNITS: gl.constexpr = factors.shape[0] // SECTIONS
    sections = ()
    for section in gl.static_range(SECTIONS):
        numbers = operand[section] if HOW is None else settled(operand_of(operand, section, HOW[0], HOW[1], HOW[2]))
        columns = factors.index(section * UNITS + unit).permute((1, 0))
        begun = warpgroup_mma(numbers, columns, begun, use_acc=section > 0, is_async=True)
        sections = sections + (numbers,)
    return _with_bias(begun, bias), sections


@gluon.jit
def awaited_of(numbers, operand):
    """Numbers of products, a tuple, once none is under way, and the sections of the operand, which they read."""
    both = warpgroup_mma_wait(0, deps=numbers + operand)
    first, sections = (), ()
    for each in gl.static_range(len(numbers)):
        first = first + (both[each],)
    for each in gl.static_range(len(operand)):
        sections = sections + (both[len(numbers) + each],)
    return first, sections
