"""Triton kernels that round latents to packed codes, one group of one token a program, and make numbers of them."""

import triton
import triton.language as tl

# Adding and taking away 1.5 * 2^23 rounds a float32 to the nearest whole number, halves to even.
ROUNDING: tl.constexpr = tl.constexpr(12582912.0)


# In a cache that grows, some tokens' places are aligned and others' not.
@triton.jit(do_not_specialize_on_alignment=["codes", "parameters"])
def quantize_kernel(
    latents, clips, codes, parameters, slots, width_of, offset_of, byte_of, plane_of,
    length, latents_t, codes_b, codes_t, parameters_b, parameters_t, smallest_scale, largest_zero,
    BITS: tl.constexpr, PIECES: tl.constexpr, SYMMETRIC: tl.constexpr, WHOLE_ZEROS: tl.constexpr,
    HAS_CLIPS: tl.constexpr, HAS_SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `palu.kernels.quantize.quantize`. A piece is every PIECES-th latent, so that packing needs no exchange.

    latents: [rows * length, width]; codes: uint8 [rows, length, bytes]; parameters: fp16 [rows, length, groups or
    2 * groups]; HAS_SLOTS: both have more tokens, of which the new ones are slots [length].
    """
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, slot = token // length, token % length
    if HAS_SLOTS:
        slot = tl.load(slots + slot)
    codes += row * codes_b + slot * codes_t
    parameters += row * parameters_b + slot * parameters_t
    width, offset = tl.load(width_of + group), tl.load(offset_of + group)
    column = tl.arange(0, BLOCK // PIECES)
    ok = column < width // PIECES
    source = latents + token * latents_t + offset + column * PIECES
    low, high = float("inf"), float("-inf")
    values = ()
    for piece in tl.static_range(PIECES):
        value = tl.load(source + piece, mask=ok, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(ok, value, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(ok, value, float("-inf")), 0))
        values = values + (value,)
    clip = 1.0
    if HAS_CLIPS:
        clip = tl.load(clips + group)
    top: tl.constexpr = (1 << BITS) - 1
    magnitude = tl.maximum(tl.abs(low), tl.abs(high))
    if SYMMETRIC:
        scale = tl.div_rn(magnitude * clip, (1 << (BITS - 1)) - 0.5)
    else:
        span = (high - low) * clip
        scale = tl.maximum(tl.div_rn(span, top * 1.0), tl.div_rn(magnitude, largest_zero))
    scale = tl.minimum(tl.maximum(scale, smallest_scale), 60000.0).to(tl.float16)
    step = scale.to(tl.float32)
    zero = (1 << (BITS - 1)) * 1.0
    if SYMMETRIC:
        tl.store(parameters + group, scale)
    else:
        zero = tl.div_rn((span - low - high) * 0.5, step)
        if WHOLE_ZEROS:
            zero = (zero + ROUNDING) - ROUNDING
        half = zero.to(tl.float16)
        zero = half.to(tl.float32)
        tl.store(parameters + 2 * group, scale)
        tl.store(parameters + 2 * group + 1, half)
    out = codes + tl.load(byte_of + group)
    first = tl.zeros((BLOCK // PIECES,), tl.int32)
    second, plane = first, first
    for piece in tl.static_range(PIECES):
        code = tl.minimum(tl.maximum(tl.div_rn(values[piece], step) + zero, 0.0), top * 1.0)
        code = ((code + ROUNDING) - ROUNDING).to(tl.int32)
        if BITS == 3:
            plane = plane | ((code >> 2) << piece)
            if piece < 4:
                first = first | ((code & 3) << (2 * piece))
            else:
                second = second | ((code & 3) << (2 * piece - 8))
        else:
            first = first | (code << (BITS * piece))
    if BITS == 3:
        tl.store(out + 2 * column, first.to(tl.uint8), mask=ok)
        tl.store(out + 2 * column + 1, second.to(tl.uint8), mask=ok)
        at_plane = codes + tl.load(plane_of + group)
        tl.store(at_plane + column, plane.to(tl.uint8), mask=ok)
    else:
        tl.store(out + column, first.to(tl.uint8), mask=ok)


@triton.jit(do_not_specialize=["tokens", "length", "first", "start"])
def dequantize_kernel(
    codes, scales, zeros, numbers, width_of, offset_of, tokens, length, first, start, plane,
    codes_b, codes_t, scales_b, scales_t, scales_g, zeros_b, zeros_t, zeros_g, numbers_t,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`scale * (code - zero)` of TOKENS tokens of a group, as `PackedLatents.dequantized`, in float32.

    codes: uint8 [rows, length, bytes], 3 bits with the highest ones `plane` bytes behind; numbers: [rows * length,
    latents from `start` on], of groups from `first` on.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    row, slot, group = token // length, token % length, first + tl.program_id(1)
    width, offset = tl.load(width_of + group), tl.load(offset_of + group)
    scale = tl.load(scales + row * scales_b + slot * scales_t + group * scales_g, mask=there, other=0.0)
    zero = tl.full((TOKENS,), (1 << (BITS - 1)) * 1.0, tl.float32)
    if not SYMMETRIC:
        zero = tl.load(zeros + row * zeros_b + slot * zeros_t + group * zeros_g, mask=there, other=0.0).to(tl.float32)
    at = (codes + row * codes_b + slot * codes_t)[:, None]
    out = (numbers + token * numbers_t)[:, None]
    for column in range(0, width, BLOCK):
        latent = offset + column + tl.arange(0, BLOCK)[None, :]
        ok = there[:, None] & (latent < offset + width)
        if BITS == 3:
            code = (tl.load(at + latent // 4, mask=ok, other=0).to(tl.int32) >> (latent % 4 * 2)) & 3
            code |= ((tl.load(at + plane + latent // 8, mask=ok, other=0).to(tl.int32) >> (latent % 8)) & 1) << 2
        else:
            PER_BYTE: tl.constexpr = 8 // BITS
            code = tl.load(at + latent // PER_BYTE, mask=ok, other=0).to(tl.int32) >> (latent % PER_BYTE * BITS)
            code &= (1 << BITS) - 1
        number = (code.to(tl.float32) - zero[:, None]) * scale.to(tl.float32)[:, None]
        tl.store(out + (latent - start), number.to(numbers.dtype.element_ty), mask=ok)
