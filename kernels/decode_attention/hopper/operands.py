"""Latents in registers as the left side of a product: as they are, or made of packed codes.

Shared memory holds packed codes as 16-bit units of `16 / bits` neighbouring latents, their fields. Two units that
stand side by side become two fp16 numbers for each field, so a product meets all units' first fields, then all second
ones, .. (`palu.kernels.latent_scores.factors.unit_order`). Keys have units of a token side by side, values the same
unit of two tokens, which the transposing load brings together.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.common import TILE, bits_of

# Latents of a section, where a group has more than twice as many, so that products skip what no group has.
SECTION: gl.constexpr = gl.constexpr(64)


@gluon.constexpr_function
def swizzled(columns: int) -> gl.NVMMASharedLayout:
    """Rows of so many 16-bit numbers in shared memory."""
    return gl.NVMMASharedLayout(min(128, 2 * columns), 16, rank=2)


@gluon.constexpr_function
def _fields(bits: int, scaled: bool) -> tuple[str, str]:
    """Assembly that makes pairs of fp16 numbers, a field's codes less the zero point, of a pair of units.

    A code or-ed into the mantissa of 1024 is 1024 + code, from which 1024 and the zero point are taken away, all of
    them whole numbers that fp16 holds. The second code of a byte gives 1024 + 16 code, of which a sixteenth is taken
    with a multiply-add, less 64 and the zero point. scaled: another pair is multiplied in.
    """
    count = 16 // bits
    names = [f"${field}" for field in range(count)]
    packed, base, other = f"${count}", f"${count + 1}", f"${count + 2}"
    lines = [".reg .b32 high, sixteenth;", f"shr.b32 high, {packed}, 8;", "mov.b32 sixteenth, 0x2c002c00;"]
    sources = (packed, "high") if bits == 8 else (packed, packed, "high", "high")
    for field, source in enumerate(sources):
        name = names[field]
        second = bits == 4 and field % 2 == 1
        mask = "0x00ff00ff" if bits == 8 else "0x00f000f0" if second else "0x000f000f"
        lines.append(f"lop3.b32 {name}, {source}, {mask}, 0x64006400, 0xea;")
        lines.append(
            f"fma.rn.f16x2 {name}, {name}, sixteenth, {other};" if second else f"sub.f16x2 {name}, {name}, {base};"
        )
    if scaled:
        lines += [f"mul.f16x2 {name}, {name}, ${count + 3};" for name in names]
    # Results are written before all is read.
    return "{ " + " ".join(lines) + " }", ",".join(["=&r"] * count + ["r"] * (3 + scaled))


@gluon.constexpr_function
def _types(bits: int, dtype: gl.dtype) -> tuple[gl.dtype, ...]:
    return (dtype,) * (16 // bits)


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
def key_operand(
    loaded, zero, scale, BITS: gl.constexpr, TURNED: gl.constexpr, SCALED: gl.constexpr
):  # fmt: skip
    """A tile's key latents as the left side of a product; codes less zero points [tile] in `unit_order`.

    loaded: numbers, or units of codes, in the layout of that side. TURNED: latents in the order of `last_first`.
    SCALED: codes are times their scales [tile].
    """
    operand: gl.constexpr = loaded.type.layout
    if BITS < 16:
        UNITS: gl.constexpr = loaded.shape[1]
        base, other = _along(zero + 1024.0, UNITS, operand), _along(-64.0 - zero, UNITS, operand)
        given = (loaded, base, other, _along(scale, UNITS, operand)) if SCALED else (loaded, base, other)
        fields = gl.inline_asm_elementwise(
            _fields(BITS, SCALED)[0], _fields(BITS, SCALED)[1], given,
            dtype=_types(BITS, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
        if BITS == 8:
            loaded = gl.join(fields[0], fields[1]).permute([0, 2, 1]).reshape([TILE, 2 * UNITS])
        else:
            joined = gl.join(gl.join(fields[0], fields[1]), gl.join(fields[2], fields[3]))
            loaded = joined.permute([0, 3, 2, 1]).reshape([TILE, 4 * UNITS])
    if TURNED:
        loaded = last_first(loaded)
    return gl.convert_layout(loaded, operand, assert_trivial=True)


@gluon.jit
def _rows_of(fields, BITS: gl.constexpr):
    """Fields [units, tokens] of a chunk's values as rows of a product, [128, tokens]."""
    TOKENS: gl.constexpr = fields[0].shape[1]
    if BITS == 8:
        rows = gl.join(fields[0], fields[1]).permute([2, 0, 1]).reshape([128, TOKENS])
    else:
        joined = gl.join(gl.join(fields[0], fields[1]), gl.join(fields[2], fields[3]))
        # Of warps, their lanes, tokens and fields: a warp's rows of both halves of the product.
        rows = joined.reshape([4, 8, TOKENS, 2, 2]).permute([4, 0, 3, 1, 2]).reshape([128, TOKENS])
    return rows


@gluon.constexpr_function
def _signed_fields(bits: int) -> tuple[str, str]:
    """Assembly that makes numbers of the codes of two words of units, of tokens t, t + 1 and t + 8, t + 9.

    A code is the mantissa of a subnormal fp16 number. Of t + 1 and t + 8 it is taken from the largest code, and the
    sign is set, so that the numbers' mean is about zero.
    """
    count, most = 16 // bits, (1 << bits) - 1
    lines = [".reg .b32 high;"]
    for word in range(2):
        packed = f"${2 * count + word}"
        for byte, source in enumerate((packed, "high")):
            if byte == 1:
                lines.append(f"shr.b32 high, {packed}, 8;")
            for field in range(8 // bits):
                name, code = f"${2 * (byte * 8 // bits + field) + word}", most << field * bits
                negative = (0x8000 | code) << (0 if word else 16)
                lines.append(f"lop3.b32 {name}, {source}, {code << 16 | code:#010x}, {negative:#010x}, 0x6a;")
    # Results are written before all is read.
    return "{ " + " ".join(lines) + " }", ",".join(["=&r"] * 2 * count + ["r", "r"])


@gluon.jit
def value_units(slot):
    """Units of a chunk's values, [units, tokens], of shared memory [tokens, units]."""
    return slot.permute((1, 0)).load(units_layout(slot.shape[1], slot.shape[0]))


@gluon.jit
def value_operand(packed, result: gl.constexpr, BITS: gl.constexpr):
    """Codes of a chunk's values as `_signed_fields` leaves them, [128, tokens], of `value_units`."""
    fields = gl.inline_asm_elementwise(
        _signed_fields(BITS)[0], _signed_fields(BITS)[1], [packed], dtype=_types(BITS, gl.float16), is_pure=True, pack=4
    )
    return gl.convert_layout(_rows_of(fields, BITS), gl.DotOperandLayout(0, result, 2), assert_trivial=True)


@gluon.jit
def taken_of_numbers(token, BITS: gl.constexpr):
    """What numbers of `value_operand` have less than codes, by token."""
    return gl.where((token ^ (token >> 3)) & 1 == 0, 0.0, float((1 << BITS) - 1))


@gluon.jit
def codes_of_numbers(latent, BITS: gl.constexpr):
    """What makes codes of the numbers of `value_operand`, by latent."""
    # Codes of a byte's upper half are sixteen times as large.
    return gl.where((latent % 2 == 0) | (BITS == 8), 1.0 * (1 << 24), 1.0 * (1 << 20))


@gluon.constexpr_function
def _bytes(bits: int) -> tuple[str, str]:
    """Assembly that makes words of four tokens' codes, one word of each field, of units of two by two tokens.

    Of 8 bits the middle code is taken away, so that they are signed.
    """
    count = 16 // bits
    lines = [".reg .b32 even, odd;"]
    lines += [
        f"prmt.b32 {name}, ${count}, ${count + 1}, {order};" for name, order in (("even", "0x6420"), ("odd", "0x7531"))
    ]
    if bits == 8:
        lines += ["xor.b32 $0, even, 0x80808080;", "xor.b32 $1, odd, 0x80808080;"]
    else:
        for field, source in enumerate(("even", "odd")):
            lines.append(f"and.b32 ${2 * field}, {source}, 0x0f0f0f0f; shr.b32 {source}, {source}, 4;")
            lines.append(f"and.b32 ${2 * field + 1}, {source}, 0x0f0f0f0f;")
    return "{ " + " ".join(lines) + " }", ",".join(["=&r"] * count + ["r", "r"])


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
def bytes_operand(packed, result: gl.constexpr, BITS: gl.constexpr):
    """Codes of a chunk's values, int8 [128, tokens] `side_by_side`, of `value_units`; rows as in `value_operand`."""
    fields = gl.inline_asm_elementwise(
        _bytes(BITS)[0], _bytes(BITS)[1], [packed], dtype=_types(BITS, gl.int8), is_pure=True, pack=4
    )
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


@gluon.constexpr_function
def _key_bytes(bits: int) -> tuple[str, str]:
    """Assembly that makes words of four codes of two words of units; of 8 bits less the middle code."""
    if bits == 8:
        return "xor.b32 $0, $2, 0x80808080; xor.b32 $1, $3, 0x80808080;", "=&r,=&r,r,r"
    lines = [".reg .b32 upper;"]
    for word in range(2):
        lines.append(f"and.b32 ${2 * word}, ${4 + word}, 0x0f0f0f0f; shr.b32 upper, ${4 + word}, 4;")
        lines.append(f"and.b32 ${2 * word + 1}, upper, 0x0f0f0f0f;")
    return "{ " + " ".join(lines) + " }", "=&r,=&r,=&r,=&r,r,r"


@gluon.jit
def key_bytes(slot, result: gl.constexpr, BITS: gl.constexpr):
    """A tile's key codes, int8 [tile, RANK] in the order of `latent_of_byte`, from shared memory."""
    UNITS: gl.constexpr = slot.shape[1]
    packed = slot.load(_key_units_layout(UNITS))
    fields = gl.inline_asm_elementwise(
        _key_bytes(BITS)[0], _key_bytes(BITS)[1], [packed], dtype=_types(BITS, gl.int8), is_pure=True, pack=4
    )
    if BITS == 8:
        # Of sixteens of units: halves, pairs, which of a pair, word.
        joined = gl.join(fields[0], fields[1]).reshape([TILE, UNITS // 16, 2, 4, 2, 2])
        codes = joined.permute([0, 1, 5, 3, 2, 4]).reshape([TILE, 2 * UNITS])
    else:
        joined = gl.join(gl.join(fields[0], fields[1]), gl.join(fields[2], fields[3]))
        joined = joined.reshape([TILE, UNITS // 16, 2, 4, 2, 2, 2])
        codes = joined.permute([0, 1, 6, 5, 3, 2, 4]).reshape([TILE, 4 * UNITS])
    return gl.convert_layout(codes, gl.DotOperandLayout(0, result, 4), assert_trivial=True)


@gluon.jit
def latent_of_byte(place, BITS: gl.constexpr):
    """Which latent stands at a place of `key_bytes`."""
    if BITS == 4:
        place = place // 32 * 32 + place % 16 // 4 * 8 + place % 4 * 2 + place % 32 // 16
    return place


@gluon.jit
def by_latent(numbers, BITS: gl.constexpr):
    """Rows [128, columns] of `value_operand`, latent after latent."""
    COLUMNS: gl.constexpr = numbers.shape[1]
    if BITS == 8:
        numbers = numbers.reshape([2, 64, COLUMNS]).permute([1, 0, 2]).reshape([128, COLUMNS])
    elif BITS == 4:
        numbers = numbers.reshape([2, 4, 2, 8, COLUMNS]).permute([1, 3, 0, 2, 4]).reshape([128, COLUMNS])
    return numbers


@gluon.jit
def latent_at(place, RANK: gl.constexpr, BITS: gl.constexpr):
    """Which latent stands at a place of `unit_order`."""
    FIELDS: gl.constexpr = 16 // BITS
    return place % (RANK // FIELDS) * FIELDS + place // (RANK // FIELDS)


@gluon.jit
def kv_head_of(slot, QUERY_SLOTS: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr):
    """Which of the group's kv heads and which of its queries has a slot: COLUMNS slots have TOGETHER kv heads.

    Slots without a kv head give one that there is not.
    """
    inside = slot % COLUMNS
    kv_head = gl.where(inside // QUERY_SLOTS < TOGETHER, slot // COLUMNS * TOGETHER + inside // QUERY_SLOTS, 1 << 20)
    return kv_head, inside % QUERY_SLOTS
