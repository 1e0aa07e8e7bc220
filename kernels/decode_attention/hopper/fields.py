"""Assembly that makes numbers of packed codes: of a unit's fields, codes at its bits 0, bits, 2 bits, ..

Of 2 bits a byte's four fields hold their codes one, four, sixteen and sixty-four times as large; so do those of 3 bits'
low plane, whose high bits come as a byte for each unit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def planes_of(bits: int) -> int:
    """Planes of codes: of 3 bits one of two, then one of one."""
    return 2 if bits == 3 else 1


@gluon.constexpr_function
def fields_of(bits: int) -> int:
    """Codes of a unit of the low plane."""
    return 8 if bits == 3 else 16 // bits


@gluon.constexpr_function
def types_of(count: int, dtype: gl.dtype) -> tuple[gl.dtype, ...]:
    """As many results of a type."""
    return (dtype,) * count


@gluon.constexpr_function
def _assembly(lines: list[str], results: int, given: int) -> tuple[str, str]:
    # Results are written before all is read.
    return "{ " + " ".join(lines) + " }", ",".join(["=&r"] * results + ["r"] * given)


@gluon.constexpr_function
def _both(half: int) -> str:
    """A pattern of both halves of a word."""
    return f"{half << 16 | half:#010x}"


@gluon.constexpr_function
def _shifted(name: str, source: str, left: int) -> str:
    return f"shl.b32 {name}, {source}, {left};" if left >= 0 else f"shr.b32 {name}, {source}, {-left};"


@gluon.constexpr_function
def key_fields(bits: int, scaled: bool) -> tuple[str, str]:
    """Pairs of fp16 numbers, a field's codes less the zero point, of a pair of units.

    Of 8 and 4 bits: a code or-ed into the mantissa of 1024 is 1024 + code, from which 1024 and the zero point are taken
    away, all of them whole numbers that fp16 holds. The second code of a byte gives 1024 + 16 code, of which a
    sixteenth is taken with a multiply-add, less 64 and the zero point. Of fewer bits zero points have fractions, which
    are taken away apart. scaled: another pair is multiplied in.
    """
    if bits < 4:
        return _few_key_fields(bits, scaled)
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
    return _assembly(lines, count, 3 + scaled)


@gluon.constexpr_function
def _few_key_fields(bits: int, scaled: bool) -> tuple[str, str]:
    """Of 2 or 3 bits: given the pair of units, the zero points, of 3 bits the units' high bits, any scales."""
    packed, zero, high, scale = "$8", "$9", "$10", f"${9 + bits - 1}"
    lines = [".reg .b32 upper, high, less<4>, part<4>;", f"shr.b32 upper, {packed}, 8;"]
    # A code that is 4^f times as large, or-ed into the mantissa of 1024: a 4^f-th of it, less that of 1024.
    for place, less in enumerate(("0x64006400", "0xdc00dc00", "0xd400d400", "0xcc00cc00")):
        lines.append(f"mov.b32 less{place}, {less};")
    for place, part in enumerate(("0x3c003c00", "0x34003400", "0x2c002c00", "0x24002400")):
        lines.append(f"mov.b32 part{place}, {part};")
    for field in range(8):
        name, place = f"${field}", field % 4
        source = packed if field < 4 else "upper"
        lines.append(f"lop3.b32 {name}, {source}, {_both(3 << 2 * place)}, 0x64006400, 0xea;")
        if bits == 3:
            lines.append(_shifted("high", high, 2 * place + 2 - field))
            lines.append(f"lop3.b32 {name}, high, {_both(4 << 2 * place)}, {name}, 0xea;")
        if place == 0:
            lines.append(f"sub.f16x2 {name}, {name}, less0;")
        else:
            lines.append(f"fma.rn.f16x2 {name}, {name}, part{place}, less{place};")
        lines.append(f"sub.f16x2 {name}, {name}, {zero};")
    if scaled:
        lines += [f"mul.f16x2 ${field}, ${field}, {scale};" for field in range(8)]
    return _assembly(lines, 8, bits + scaled)


@gluon.constexpr_function
def signed_fields(bits: int) -> tuple[str, str]:
    """Numbers of the codes of two words of units, of tokens t, t + 1 and t + 8, t + 9.

    A code is the mantissa of a subnormal fp16 number. Of t + 1 and t + 8 it is taken from the largest code, and the
    sign is set, so that the numbers' mean is about zero. Of 2 and 3 bits of one byte of the units, as `byte_of` has it,
    given behind them, and before the units' high bits.
    """
    if bits < 4:
        return _few_signed_fields(bits)
    count, most = 16 // bits, (1 << bits) - 1
    lines = [".reg .b32 high;"]
    for word in range(2):
        packed = f"${2 * count + word}"
        for byte, source in enumerate((packed, "high")):
            if byte == 1:
                lines.append(f"shr.b32 high, {packed}, 8;")
            for field in range(8 // bits):
                name, code = f"${2 * (byte * 8 // bits + field) + word}", most << field * bits
                lines.append(f"lop3.b32 {name}, {source}, {_both(code)}, {_negative(code, word)}, 0x6a;")
    return _assembly(lines, 2 * count, 2)


@gluon.constexpr_function
def _negative(code: int, word: int) -> str:
    """What turns a code of the second token of word 0, or of the first one of word 1, into what is missing of it."""
    return f"{(0x8000 | code) << (0 if word else 16):#010x}"


@gluon.constexpr_function
def _few_signed_fields(bits: int) -> tuple[str, str]:
    lines = [".reg .b32 byte, high, bit, amount;"]
    for word in range(2):
        order = f"${10 + word}"
        lines.append(f"prmt.b32 byte, ${8 + word}, 0, {order};")
        if bits == 3:
            lines.append(f"and.b32 amount, {order}, 1; shl.b32 amount, amount, 2;")
            lines.append(f"shr.b32 high, ${12 + word}, amount;")
        for field in range(4):
            name, place = f"${2 * field + word}", 2 * field
            least = ((1 << bits) - 1) << place
            lines.append(f"lop3.b32 {name}, byte, {_both(3 << place)}, {_negative(least, word)}, 0x6a;")
            if bits == 3:
                lines.append(_shifted("bit", "high", place + 2 - field))
                lines.append(f"lop3.b32 {name}, bit, {_both(4 << place)}, {name}, 0x6a;")
    return _assembly(lines, 8, 2 * bits)


@gluon.constexpr_function
def byte_of(half: int) -> int:
    """What of a pair of units takes one byte each, the lower or the upper one, into the lower bytes."""
    return 0x4341 if half else 0x4240


@gluon.constexpr_function
def byte_fields(bits: int) -> tuple[str, str]:
    """Words of four tokens' codes, one word of each field, of units of two by two tokens.

    Of 8 bits the middle code is taken away, so that they are signed. Of 2 and 3 bits as `signed_fields`.
    """
    if bits < 4:
        return _few_byte_fields(bits)
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
    return _assembly(lines, count, 2)


@gluon.constexpr_function
def _few_byte_fields(bits: int) -> tuple[str, str]:
    # Of the tokens' bytes those that `byte_of` names: 0x6420 or 0x7531.
    lines = [
        ".reg .b32 codes, high, bit, amount, order;",
        "and.b32 amount, $6, 1; mad.lo.u32 order, amount, 0x1111, 0x6420;",
        "prmt.b32 codes, $4, $5, order;",
    ]
    if bits == 3:
        lines.append("shl.b32 amount, amount, 2; prmt.b32 high, $8, $9, 0x6420; shr.b32 high, high, amount;")
    for field in range(4):
        name = f"${field}"
        lines.append(_shifted(name, "codes", -2 * field))
        lines.append(f"and.b32 {name}, {name}, 0x03030303;")
        if bits == 3:
            lines.append(_shifted("bit", "high", 2 - field))
            lines.append(f"lop3.b32 {name}, bit, 0x04040404, {name}, 0xea;")
    return _assembly(lines, 4, 2 * bits)


@gluon.constexpr_function
def key_byte_fields(bits: int) -> tuple[str, str]:
    """Words of four codes of two words of units; of 8 bits less the middle code, of 3 bits with their high bits."""
    if bits == 8:
        return "xor.b32 $0, $2, 0x80808080; xor.b32 $1, $3, 0x80808080;", "=&r,=&r,r,r"
    width = 4 if bits == 4 else 2
    count, mask = 8 // width, "0x0f0f0f0f" if bits == 4 else "0x03030303"
    lines = [".reg .b32 upper, high, bit;"]
    for word in range(2):
        packed = f"${2 * count + word}"
        if bits == 3:
            # The upper four bits of a unit's byte belong to its upper byte.
            lines.append(f"shl.b32 high, ${2 * count + 2 + word}, 4; or.b32 high, high, ${2 * count + 2 + word};")
        for field in range(count):
            name = f"${count * word + field}"
            if field > 0:
                lines.append(f"shr.b32 upper, {packed}, {width * field};")
            lines.append(f"and.b32 {name}, {'upper' if field else packed}, {mask};")
            if bits == 3:
                lines.append(_shifted("bit", "high", 2 - field))
                lines.append(f"lop3.b32 {name}, bit, 0x04040404, {name}, 0xea;")
    return _assembly(lines, 2 * count, 2 * planes_of(bits))
