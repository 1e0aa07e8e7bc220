"""Latents inside a Triton kernel, as numbers or as packed codes.

A 32-bit word holds the codes of 32 / bits neighbouring latents. One shift, one mask and one subtraction make two fp16
numbers of it, one from each 16-bit half: code i and code i + 16 / bits. They stay neighbours, as the matrix units want
them, so latents come in an order of their own (`latent_order`) in which whatever they meet has to be taken too.
"""

import triton
import triton.language as tl


@triton.jit
def first_of_pair(COLUMNS: tl.constexpr, BITS: tl.constexpr, pair):
    """The first latent of the pair-th pair that `load_pairs` returns; the second is `half_word(BITS)` further on."""
    per_word: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    words: tl.constexpr = COLUMNS // per_word
    return pair % words * per_word + pair // words


@triton.jit
def half_word(BITS: tl.constexpr):
    """Latents whose codes lie in half a word of their (low) plane."""
    per_half: tl.constexpr = 8 if BITS == 3 else 16 // BITS
    return per_half


@triton.jit
def _assembled(word, codes: tl.constexpr, middle: tl.constexpr, halves: tl.constexpr):
    """One half of a word as fp16: its code less the middle one."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 pair, middle; .reg .b16 drop; lop3.b32 pair, $1, " + codes + ", 0x64006400, 0xea; mov.b32 middle, "
        + middle + "; sub.f16x2 pair, pair, middle; mov.b32 {" + halves + "}, pair; }",
        "=h,r", [word], dtype=tl.float16, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def load_pairs(
    source, plane, ok, first, limit, dtype: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """COLUMNS packed codes of some tokens less the middle code, in pairs: twice [tokens, COLUMNS // 2].

    Args:
        source: pointers [tokens, 1] to the first byte of the codes' (low) plane; plane: of 3-bit codes' high plane.
        ok: tokens that exist, [tokens, 1].
        first, limit: the first latent wanted (a multiple of 16) and the number of latents.
    """
    tokens: tl.constexpr = source.shape[0]
    plane_bits: tl.constexpr = 2 if BITS == 3 else BITS
    per_word: tl.constexpr = 32 // plane_bits
    words: tl.constexpr = COLUMNS // per_word
    word = first // per_word + tl.arange(0, words)
    inside = ok & (word < limit // per_word)[None, :]
    if BITS == 3:
        # Rows of 3-bit codes are multiples of two bytes only.
        halves = source.to(tl.pointer_type(tl.int16)) + 2 * word[None, :]
        low_half = tl.load(halves, mask=inside, other=0).to(tl.int32) & 0xFFFF
        packed = low_half | (tl.load(halves + 1, mask=inside, other=0).to(tl.int32) << 16)
    else:
        packed = tl.load(source.to(tl.pointer_type(tl.int32)) + word[None, :], mask=inside, other=0)
    step = tl.arange(0, per_word // 2)
    shifted = packed[:, None, :] >> (step * plane_bits)[None, :, None]
    middle: tl.constexpr = 1 << (BITS - 1)
    if BITS == 3:
        high = tl.load(plane.to(tl.pointer_type(tl.int16)) + word[None, :], mask=inside, other=0).to(tl.int32)
        high = high[:, None, :] >> step[None, :, None]
        shifted = (shifted & 0x00030003) + (high & 1) * 4 + ((high >> 8) & 1) * 0x40000
    shifted = tl.reshape(shifted, (tokens, COLUMNS // 2))
    if ASSEMBLY:
        # A code or-ed into the mantissa of 1024 is 1024 + code.
        if BITS == 8:
            low_codes = _assembled(shifted, "0x00ff00ff", "0x64806480", "$0, drop")
            high_codes = _assembled(shifted, "0x00ff00ff", "0x64806480", "drop, $0")
        elif BITS == 4:
            low_codes = _assembled(shifted, "0x000f000f", "0x64086408", "$0, drop")
            high_codes = _assembled(shifted, "0x000f000f", "0x64086408", "drop, $0")
        elif BITS == 3:
            low_codes = _assembled(shifted, "0x00070007", "0x64046404", "$0, drop")
            high_codes = _assembled(shifted, "0x00070007", "0x64046404", "drop, $0")
        else:
            low_codes = _assembled(shifted, "0x00030003", "0x64026402", "$0, drop")
            high_codes = _assembled(shifted, "0x00030003", "0x64026402", "drop, $0")
    else:
        top: tl.constexpr = (1 << BITS) - 1
        low_codes = ((shifted & top) - middle).to(dtype)
        high_codes = (((shifted >> 16) & top) - middle).to(dtype)
    return low_codes, high_codes


@triton.jit
def load_latents(
    source, plane, ok, first, limit, dtype: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """[tokens, COLUMNS] latents, or as `load_pairs` codes less the middle one in the order of `latent_order`."""
    if BITS == 16:
        index = first + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(source + index, mask=ok & (index < limit), other=0.0)
    else:
        low, high = load_pairs(source, plane, ok, first, limit, dtype, BITS, COLUMNS, ASSEMBLY)
        tokens: tl.constexpr = source.shape[0]
        x = tl.reshape(tl.join(low, high), (tokens, COLUMNS))
    return x
