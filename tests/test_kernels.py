"""Every op against a float64 definition written a different way."""

import pytest
import torch

from palu.kernels.decode_attention import launch, reference
from palu.kernels.decode_attention.op import decode_attention
from palu.kernels.decode_attention.spec import SHAPES, TOLERANCE, Shape
from palu.kernels.latents import LatentProjection
from palu.kernels.quantize import Quantization, quantization_widths, quantize
from palu.kernels.rotation import Rotation
from tests.kernel_calls import KERNEL_SHAPES, RandomNorm, close, defined, name_of, on_device, quantized, random_call

pytestmark = pytest.mark.usefixtures("empty_memory_is_nan")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("variant", ["plain", "bias", "key norm"])
def test_decode_attention_equals_its_definition(shape, dtype, variant, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_LENGTH", 50)
    weight = torch.rand(shape.head_dim) + 0.5
    norm = (
        (lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.to(x))
        if variant == "key norm"
        else None
    )
    call = random_call(shape, getattr(torch, dtype), variant == "bias")
    scaling = shape.head_dim**-0.5
    output, probabilities = decode_attention(*call, scaling, key_norm=norm)
    expected = defined(*call, scaling, shape, norm)
    assert output.dtype == call[0].dtype
    assert (output.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]
    assert probabilities.float().sum(-1).allclose(torch.ones(()), atol=2e-2)
    additive = torch.zeros(call[-1].shape).masked_fill(~call[-1], -1e30)
    again, _ = decode_attention(*call[:-1], additive, scaling, key_norm=norm)
    assert torch.allclose(again.float(), output.float(), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_arithmetic_on_codes_equals_dequantising_first(shape, bits, symmetric, group_size, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_LENGTH", 50)
    query, *latents, key, value, rotation, mask = random_call(shape, torch.float32, True)
    packed = [
        quantize(latent * 3 + 0.2, Quantization(bits, quantization_widths(ranks, group_size), symmetric))
        for latent, ranks in zip(latents, (shape.key_ranks, shape.value_ranks), strict=True)
    ]
    output, _ = decode_attention(query, *packed, key, value, rotation, mask, shape.head_dim**-0.5)
    dense = [codes.dequantized(torch.float32) for codes in packed]
    expected = defined(query, *dense, key, value, rotation, mask, shape.head_dim**-0.5, shape, None)
    assert (output.double() - expected).norm() / expected.norm() < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_long_flat_attention_over_offset_latents_stays_in_the_range_of_16_bit_floats(bits, dtype):
    shape = Shape(1, 2, 2, 64, 1, 4500, (64,), (64,))
    query, *latents, key, value, rotation, _ = random_call(shape, torch.float32, False)
    mask = torch.ones(1, 1, 1, shape.length, dtype=torch.bool)
    # One latent lies at the top of every token's range, another far from zero.
    latents = [latent + 30 * (torch.arange(64) == 3) - 20 * (torch.arange(64) == 9) for latent in latents]
    held = latents
    if bits < 16:
        latents = [quantize(latent, Quantization(bits, (64,))) for latent in latents]
        held = [packed.dequantized(torch.float32) for packed in latents]
    low = getattr(torch, dtype)
    cast = [latent if bits < 16 else latent.to(low) for latent in latents]
    sides = [LatentProjection(side.up.to(low), side.ranks, None) for side in (key, value)]
    output, _ = decode_attention(query.to(low), *cast, *sides, rotation, mask, 1e-3)
    expected = defined(query, *held, key, value, rotation, mask, 1e-3, shape, None)
    assert torch.isfinite(output).all()
    assert (output.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=name_of)
@pytest.mark.parametrize("variant", ["plain", "bias", "key norm"])
@pytest.mark.parametrize("gapless", [True, False], ids=["gapless", "gaps"])
def test_kernels_equal_the_definition(shape, dtype, variant, gapless, monkeypatch):
    # The kernel for Hopper has tests of its own.
    monkeypatch.setattr(launch, "runs_hopper_kernel", lambda device: False)
    call = random_call(shape, getattr(torch, dtype), variant == "bias", gapless)
    norm = RandomNorm(shape.head_dim) if variant == "key norm" else None
    scaling = shape.head_dim**-0.5
    expected = defined(*call, scaling, shape, norm)
    additive = torch.zeros(call[-1].shape).masked_fill(~call[-1], torch.finfo(torch.float32).min)
    masks = (call[-1], additive)
    if not torch.cuda.is_available():
        # Triton's interpreter takes seconds for each: every shape and variant sees both kinds, by turns.
        masks = masks[(dtype == "float16") ^ gapless :][:1]
    for mask in masks:
        moved = on_device(*call[:-1], mask)
        moved_norm = None if norm is None else norm.to(moved[0].device)
        assert launch.can_take(*moved[:-1], moved[-1], moved_norm)
        assert close(launch.decode_attention(*moved, scaling, moved_norm), expected, dtype)


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("variant", ["plain", "key norm"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], *KERNEL_SHAPES[len(SHAPES) :][:2]], ids=name_of)
def test_groups_of_heads_may_see_tokens_of_their_own(shape, bits, variant):
    """Every key group with its own positions, or two groups that share them."""
    dtype = "float16"
    call = list(random_call(shape, getattr(torch, dtype), False))
    norm = RandomNorm(shape.head_dim) if variant == "key norm" else None
    scaling, groups = shape.head_dim**-0.5, len(shape.key_ranks)
    packed, held = quantized(call[1:3], bits, *call[3:5])
    for own in {groups, groups // 2}:
        positions = torch.randint(0, 300, (shape.batch, shape.length, own))
        rotation = Rotation(positions if own > 1 else positions[..., 0], call[5].frequencies)
        expected = defined(call[0], *held, *call[3:5], rotation, call[6], scaling, shape, norm)
        moved = on_device(call[0], *packed, *call[3:5], rotation, call[6])
        moved_norm = None if norm is None else norm.to(moved[0].device)
        assert close(launch.decode_attention(*moved, scaling, moved_norm), expected, dtype)
        assert close(decode_attention(*moved, scaling, moved_norm, with_probabilities=True)[0], expected, dtype)


def test_kernels_leave_to_the_reference_what_they_cannot_take():
    query, keys, values, key, value, rotation, mask = random_call(SHAPES[1], torch.float32, False)
    call = (query, keys, values, key, value)
    assert launch.can_take(*call, rotation, mask, None)
    assert not launch.can_take(*call, rotation, mask.expand(-1, 8, -1, -1), None)
    assert not launch.can_take(*call, rotation, mask, lambda x: x)
    assert not launch.can_take(query.double(), *call[1:], rotation, mask, None)
    assert not launch.can_take(query, keys.half(), *call[2:], rotation, mask, None)
    uneven = LatentProjection(key.up, (100, 28), None)
    assert not launch.can_take(query, keys, values, uneven, value, rotation, mask, None)
    assert not launch.can_take(query.requires_grad_(), *call[1:], rotation, mask, None)


def test_quantisation_groups_across_a_border_are_refused():
    packed = quantize(torch.randn(1, 2, 64), Quantization(4, (40, 24)))
    with pytest.raises(ValueError, match="do not fit the ranks"):
        packed.pieces((32, 32))


def test_widths_that_do_not_fit_the_ranks_are_refused():
    query, keys, values, key, value, rotation, mask = random_call(SHAPES[1], torch.float32, False)
    with pytest.raises(ValueError, match="key latents are 127 wide"):
        decode_attention(query, keys[..., :-1], values, key, value, rotation, mask, 1.0)
    with pytest.raises(ValueError, match="63 key latents but 62 value latents"):
        decode_attention(query, keys, values[:, 1:], key, value, rotation, mask, 1.0)


def test_half_precision_scores_are_scaled_before_they_can_overflow():
    shape = Shape(1, 2, 2, 64, 1, 5, (64,), (64,))
    query, keys, values, key, value, rotation, mask = random_call(shape, torch.float16, False)
    output, _ = decode_attention(query * 60, keys * 60, values, key, value, rotation, mask, 1 / 64)
    assert torch.isfinite(output).all()


def test_cost_formulas():
    shape = Shape(2, 8, 4, 64, 1, 10, (96, 32), (160,))
    assert shape.bytes_read(2) == 2 * 10 * (128 + 160) * 2
    assert shape.flops() == 2 * 2 * 10 * (128 * 128 + 8 * 64 + 160 * 8)
