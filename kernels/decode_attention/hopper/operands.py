"""Latents in registers as the left side of a product: as they are, or made of packed codes.

Shared memory holds packed codes as 16-bit units of `16 / bits` neighbouring latents, their fields, 3 bits as units of
their low plane and bytes of the high one. Two units that stand side by side become two fp16 numbers for each field, so
a product meets all units' first fields, then all second ones, .. (`palu.kernels.latent_scores.factors.unit_order`).
Keys have units of a token side by side, values the same unit of two tokens, which the transposing load brings together.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.common import TILE, bits_of
from palu.kernels.decode_attention.hopper.fields import (
    byte_fields,
    byte_of,
    fields_of,
    key_byte_fields,
    key_fields,
    planes_of,
    signed_fields,
    types_of,
)

# Rows of a product of values.
CHUNK: gl.constexpr = gl.constexpr(128)


@gluon.constexpr_function
def section_of(bits: int) -> int:
    """Latents of a section, where a group has more than 128, so that products skip what no group has.

    A field of a section's units is a product's whole step.
    """
    return max(64, 16 * fields_of(bits))


@gluon.constexpr_function
def swizzled(columns: int) -> gl.NVMMASharedLayout:
    """Rows of so many 16-bit numbers in shared memory."""
    return gl.NVMMASharedLayout(min(128, 2 * columns), 16, rank=2)


@gluon.constexpr_function
def units_layout(units: int, tokens: int) -> gl.DistributedLinearLayout:
    """Units [units, tokens] as the matrix units want the fields of them: pairs of tokens, a unit in one lane of four.

    64 units: a field is 64 rows of a product; 32: two fields are. Two pairs of tokens follow each other.
    """
    held = [[0, 8 << bit] for bit in range(bits_of(tokens) - 3)]
    if units == 64:
        return gl.DistributedLinearLayout(
            [[0, 1], held[0], [8, 0], *held[1:]],
            [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
            [[16, 0], [32, 0]],
            [],
            [units, tokens],
        )
    return gl.DistributedLinearLayout(
        [[0, 1], *held], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [units, tokens]
    )


@gluon.constexpr_function
def _halves_layout(tokens: int) -> gl.DistributedLinearLayout:
    """16 units twice, [2, units, tokens]: as `units_layout` of 32, where two warps have the same units."""
    held = [[0, 0, 8 << bit] for bit in range(bits_of(tokens) - 3)]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], *held], lanes, [[0, 8, 0], [1, 0, 0]], [], [2, 16, tokens])


@gluon.jit
def last_first(numbers):
    """Numbers [rows, columns] with the last sixteen columns first, then those before them, .."""
    ROWS: gl.constexpr = numbers.shape[0]
    COLUMNS: gl.constexpr = numbers.shape[1]
    # A column's place is its place before with all bits but the lowest four inverted, one of them at a time.
    for bit in gl.static_range(bits_of(COLUMNS // 16)):
        low, high = gl.split(numbers.reshape([ROWS, 1 << bit, 2, COLUMNS >> (bit + 1)]).permute([0, 1, 3, 2]))
        numbers = gl.join(high, low).permute([0, 1, 3, 2]).reshape([ROWS, COLUMNS])
    return numbers


@gluon.jit
def column_of(place, COLUMNS: gl.constexpr):
    """Which column stands at a place of `last_first`."""
    return (COLUMNS // 16 - 1 - place // 16) * 16 + place % 16


@gluon.jit
def _along(numbers, UNITS: gl.constexpr, operand: gl.constexpr):
    """Numbers [tile] for all of a token's units, fp16."""
    numbers = gl.convert_layout(numbers.to(gl.float16), gl.SliceLayout(1, operand))
    return numbers[:, None].broadcast_to([TILE, UNITS])


@gluon.jit
def _fields_side_by_side(fields):
    """Fields of a tile's units [tile, units]: all units' first ones, then all second ones, .."""
    UNITS: gl.constexpr = fields[0].shape[1]
    if len(fields) == 2:
        numbers = gl.join(fields[0], fields[1]).permute([0, 2, 1]).reshape([TILE, 2 * UNITS])
    elif len(fields) == 4:
        joined = gl.join(gl.join(fields[0], fields[1]), gl.join(fields[2], fields[3]))
        numbers = joined.permute([0, 3, 2, 1]).reshape([TILE, 4 * UNITS])
    else:
        numbers = _eight(fields).permute([0, 4, 3, 2, 1]).reshape([TILE, 8 * UNITS])
    return numbers


@gluon.jit
def _eight(fields):
    """Eight fields in three more dimensions, the lowest bit of their number first."""
    lower = gl.join(gl.join(fields[0], fields[1]), gl.join(fields[2], fields[3]))
    return gl.join(lower, gl.join(gl.join(fields[4], fields[5]), gl.join(fields[6], fields[7])))


@gluon.jit
def key_operand(
    loaded, high, zero, scale, BITS: gl.constexpr, TURNED: gl.constexpr, SCALED: gl.constexpr
):  # fmt: skip
    """A tile's key latents as the left side of a product; codes less zero points [tile] in `unit_order`.

    loaded: numbers, or units of codes, in the layout of that side; high: bytes of the units' high plane, a tuple.
    TURNED: latents in the order of `last_first`. SCALED: codes are times their scales [tile].
    """
    operand: gl.constexpr = loaded.type.layout
    if BITS < 16:
        UNITS: gl.constexpr = loaded.shape[1]
        if BITS < 4:
            given = (loaded, _along(zero, UNITS, operand)) + high
        else:
            given = (loaded, _along(zero + 1024.0, UNITS, operand), _along(-64.0 - zero, UNITS, operand))
        if SCALED:
            given = given + (_along(scale, UNITS, operand),)
        fields = gl.inline_asm_elementwise(
            key_fields(BITS, SCALED)[0], key_fields(BITS, SCALED)[1], given,
            dtype=types_of(fields_of(BITS), gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
        loaded = _fields_side_by_side(fields)
    if TURNED:
        loaded = last_first(loaded)
    return gl.convert_layout(loaded, operand, assert_trivial=True)


@gluon.jit
def high_bytes(slot, layout: gl.constexpr):
    """Bytes of a high plane in shared memory as they stand beside units."""
    return slot.load(layout).to(gl.int16)


@gluon.jit
def _rows_of(fields, BITS: gl.constexpr):
    """Fields [units, tokens] of a chunk's values as rows of a product, [CHUNK, tokens]; of `value_units`."""
    TOKENS: gl.constexpr = fields[0].shape[1]
    if BITS == 8:
        rows = gl.join(fields[0], fields[1]).permute([2, 0, 1]).reshape([128, TOKENS])
    else:
        joined = gl.join(gl.join(fields[0], fields[1]), gl.join(fields[2], fields[3]))
        # Of warps, their lanes, tokens and fields: a warp's rows of both halves of the product.
        rows = joined.reshape([4, 8, TOKENS, 2, 2]).permute([4, 0, 3, 1, 2]).reshape([128, TOKENS])
    return rows


@gluon.jit
def _twice(slot):
    """16 units of values in shared memory [tokens, units], or their bytes, twice, [32, tokens]."""
    TOKENS: gl.constexpr = slot.shape[0]
    units = slot.permute((1, 0)).load(gl.SliceLayout(0, _halves_layout(TOKENS))).to(gl.int16)
    both = gl.expand_dims(units, 0).broadcast_to([2, slot.shape[1], TOKENS]).reshape([2 * slot.shape[1], TOKENS])
    return gl.convert_layout(both, units_layout(2 * slot.shape[1], TOKENS), assert_trivial=True)


@gluon.jit
def value_units(rings, stage, chunk: gl.constexpr, BITS: gl.constexpr):
    """What a chunk's values are made of, [units, tokens] each, a tuple: their units of the copies of a step.

    Of 2 and 3 bits, which are too few, twice, with which of their bytes is meant (`byte_of`), and their high bytes.
    rings: of every chunk [stages, tokens, units], then of their high planes.
    """
    slot = rings[chunk].index(stage)
    if BITS < 4:
        units = _twice(slot)
        which = gl.arange(0, units.shape[0], gl.SliceLayout(1, units.type.layout)) // slot.shape[1]
        byte = gl.where(which == 0, byte_of(0), byte_of(1)).to(gl.int16)
        given = (units, gl.expand_dims(byte, 1).broadcast_to(units.shape))
        if planes_of(BITS) == 2:
            given = given + (_twice(rings[len(rings) // 2 + chunk].index(stage)),)
    else:
        given = (slot.permute((1, 0)).load(units_layout(slot.shape[1], slot.shape[0])),)
    return given


@gluon.constexpr_function
def _value_fields(bits: int) -> int:
    """Fields of `value_units`."""
    return 4 if bits < 8 else 2


@gluon.jit
def value_operand(given, result: gl.constexpr, BITS: gl.constexpr):
    """Codes of a chunk's values as `signed_fields` leaves them, [CHUNK, tokens], of `value_units`."""
    fields = gl.inline_asm_elementwise(
        signed_fields(BITS)[0], signed_fields(BITS)[1], given, dtype=types_of(_value_fields(BITS), gl.float16),
        is_pure=True, pack=4,
    )  # fmt: skip
    return gl.convert_layout(_rows_of(fields, BITS), gl.DotOperandLayout(0, result, 2), assert_trivial=True)


@gluon.jit
def taken_of_numbers(token, BITS: gl.constexpr):
    """What numbers of `value_operand` have less than codes, by token."""
    return gl.where((token ^ (token >> 3)) & 1 == 0, 0.0, float((1 << BITS) - 1))


@gluon.jit
def codes_of_numbers(latent, BITS: gl.constexpr):
    """What makes codes of the numbers of `value_operand`, by latent."""
    if BITS < 4:
        # The four codes of a byte begin at bits 0, 2, 4 and 6.
        even = gl.where(latent % 4 == 0, 1.0 * (1 << 24), 1.0 * (1 << 20))
        makes = gl.where(latent % 2 == 0, even, gl.where(latent % 4 == 1, 1.0 * (1 << 22), 1.0 * (1 << 18)))
    else:
        # Codes of a byte's upper half are sixteen times as large.
        makes = gl.where((latent % 2 == 0) | (BITS == 8), 1.0 * (1 << 24), 1.0 * (1 << 20))
    return makes


@gluon.constexpr_function
def taken_away(bits: int) -> float:
    """What `bytes_operand` and `key_bytes` take away from codes."""
    return 128.0 if bits == 8 else 0.0


@gluon.jit
def side_by_side(numbers):
    """Numbers [rows, tokens] with tokens 2 i, 2 i + 1, 2 i + 8, 2 i + 9 (i < 4) side by side, of every 16."""
    ROWS: gl.constexpr = numbers.shape[0]
    TOKENS: gl.constexpr = numbers.shape[1]
    return numbers.reshape([ROWS, TOKENS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, TOKENS])


@gluon.jit
def bytes_operand(given, result: gl.constexpr, BITS: gl.constexpr):
    """Codes of a chunk's values, int8 [CHUNK, tokens] `side_by_side`, of `value_units`; rows as in `value_operand`."""
    fields = gl.inline_asm_elementwise(
        byte_fields(BITS)[0], byte_fields(BITS)[1], given, dtype=types_of(_value_fields(BITS), gl.int8), is_pure=True,
        pack=4,
    )  # fmt: skip
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 4)
    return gl.convert_layout(side_by_side(_rows_of(fields, BITS)), operand, assert_trivial=True)


@gluon.constexpr_function
def _key_units_layout(units: int) -> gl.DistributedLinearLayout:
    """Units [tile, units] as `key_bytes` needs them: two pairs of units of eights that follow each other."""
    further = [[0, 16 << bit] for bit in range(bits_of(units) - 4)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 8], [8, 0], *further], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [TILE.value, units],
    )  # fmt: skip


@gluon.jit
def key_bytes(ring, stage, result: gl.constexpr, BITS: gl.constexpr):
    """A tile's key codes, int8 [tile, RANK] in the order of `latent_of_byte`, of shared memory as in `copy_tile`."""
    UNITS: gl.constexpr = ring[0].shape[2]
    units: gl.constexpr = _key_units_layout(UNITS)
    given = (ring[0].index(stage).load(units),)
    if planes_of(BITS) == 2:
        given = given + (high_bytes(ring[1].index(stage), units),)
    fields = gl.inline_asm_elementwise(
        key_byte_fields(BITS)[0], key_byte_fields(BITS)[1], given, dtype=types_of(fields_of(BITS), gl.int8),
        is_pure=True, pack=4,
    )  # fmt: skip
    # Of sixteens of units: halves, pairs, which of a pair, then which field.
    if BITS == 8:
        joined = gl.join(fields[0], fields[1]).reshape([TILE, UNITS // 16, 2, 4, 2, 2])
        codes = joined.permute([0, 1, 5, 3, 2, 4])
    elif BITS == 4:
        joined = gl.join(gl.join(fields[0], fields[1]), gl.join(fields[2], fields[3]))
        codes = joined.reshape([TILE, UNITS // 16, 2, 4, 2, 2, 2]).permute([0, 1, 6, 5, 3, 2, 4])
    else:
        joined = _eight(fields).reshape([TILE, UNITS // 16, 2, 4, 2, 2, 2, 2])
        codes = joined.permute([0, 1, 7, 6, 5, 3, 2, 4])
    codes = codes.reshape([TILE, fields_of(BITS) * UNITS])
    return gl.convert_layout(codes, gl.DotOperandLayout(0, result, 4), assert_trivial=True)


@gluon.jit
def latent_of_byte(place, BITS: gl.constexpr):
    """Which latent stands at a place of `key_bytes`."""
    if BITS == 4:
        place = place // 32 * 32 + place % 16 // 4 * 8 + place % 4 * 2 + place % 32 // 16
    elif BITS < 4:
        place = place // 64 * 64 + place % 16 // 4 * 16 + place % 4 * 4 + place % 64 // 16
    return place


@gluon.jit
def by_latent(numbers, BITS: gl.constexpr):
    """Rows [128, columns] of `value_operand`, latent after latent."""
    COLUMNS: gl.constexpr = numbers.shape[1]
    if BITS == 8:
        numbers = numbers.reshape([2, 64, COLUMNS]).permute([1, 0, 2]).reshape([128, COLUMNS])
    elif BITS == 4:
        numbers = numbers.reshape([2, 4, 2, 8, COLUMNS]).permute([1, 3, 0, 2, 4]).reshape([128, COLUMNS])
    elif BITS < 4:
        # Two warps have the same units, of which each has one byte.
        numbers = numbers.reshape([2, 2, 2, 2, 8, COLUMNS]).permute([2, 4, 1, 0, 3, 5]).reshape([128, COLUMNS])
    return numbers


@gluon.jit
def latent_at(place, RANK: gl.constexpr, BITS: gl.constexpr):
    """Which latent stands at a place of `unit_order`."""
    FIELDS: gl.constexpr = fields_of(BITS)
    return place % (RANK // FIELDS) * FIELDS + place // (RANK // FIELDS)


@gluon.jit
def kv_head_of(slot, QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr):
    """Which of the group's kv heads and which of its queries has a slot: COLUMNS slots have TOGETHER kv heads.

    Slots without a kv head give one that there is not.
    """
    inside = slot % COLUMNS
    kv_head = gl.where(inside // QUERY_SLOTS < TOGETHER, slot // COLUMNS * TOGETHER + inside // QUERY_SLOTS, 1 << 20)
    return kv_head, inside % QUERY_SLOTS
