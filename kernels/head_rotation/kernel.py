"""Triton kernel that turns heads by tables that they share."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length"])
def rotate_kernel(
    states, cos, sin, output, length, states_b, states_h, states_t, cos_b, cos_t, sin_b, sin_t,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """As `palu.kernels.rotation.rotate`, in float32, for BLOCK_HEADS heads of a token.

    states: [batch, HEADS, length, 2 * HALF] of any strides but the last; cos, sin: [batch or 1, length, 2 * HALF];
    output: [batch, HEADS, length, 2 * HALF], contiguous.
    """
    row, token = (tl.program_id(0) // length).to(tl.int64), (tl.program_id(0) % length).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)
    inside = pair < HALF
    ok = (head < HEADS)[:, None] & inside[None, :]
    at = states + row * states_b + token * states_t + head[:, None] * states_h + pair[None, :]
    first = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    at_cos, at_sin = cos + row * cos_b + token * cos_t + pair, sin + row * sin_b + token * sin_t + pair
    first_cos = tl.load(at_cos, mask=inside, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(at_cos + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(at_sin, mask=inside, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(at_sin + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    to = output + ((row * HEADS + head[:, None]) * length + token) * (2 * HALF) + pair[None, :]
    dtype = output.dtype.element_ty
    tl.store(to, (first * first_cos - second * first_sin).to(dtype), mask=ok)
    tl.store(to + HALF, (second * second_cos + first * second_sin).to(dtype), mask=ok)
