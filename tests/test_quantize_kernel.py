"""The quantisation kernel against its definition in PyTorch."""

import pytest
import torch

from palu.kernels.latents import MixedLatents
from palu.kernels.quantization.launch import can_take, launch_dequantized, launch_encode, launch_encode_into
from palu.kernels.quantize import Quantization, encode, encode_into, quantize, reference_encode
from palu.kernels.reconstruct import op
from palu.kernels.reconstruct.reference import reconstruct
from tests.kernel_calls import to_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_parameters_equal_the_definition(bits, symmetric, dtype):
    widths = (48, 16, 96)
    clips = (0.9, 1.0, 0.75)
    sizes = torch.tensor([0.01, 3.0, 40.0]).repeat_interleave(torch.tensor(widths))
    latents = (torch.randn(2, 5, 160) * sizes + 2 * (torch.arange(160) == 7)).to(DEVICE, dtype)
    latents[0, 2, :48] = 1.5
    quantization = Quantization(bits, widths, symmetric, clips)
    assert can_take(latents, quantization)
    expected = reference_encode(latents, quantization)
    torch._dynamo.reset()
    for got in launch_encode(latents, quantization), torch.compile(encode, fullgraph=True)(latents, quantization):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_rows_of_a_wider_tensor_are_read_where_they_lie():
    wide = torch.randn(3, 4, 80, device=DEVICE)
    quantization = Quantization(4, (32,))
    codes, _ = launch_encode(wide[:, 1:3, 16:48], quantization)
    assert torch.equal(codes, reference_encode(wide[:, 1:3, 16:48].contiguous(), quantization)[0])


def test_groups_that_straddle_bytes_and_latents_with_gradients_or_of_another_width_are_left_to_the_definition():
    assert can_take(torch.randn(1, 1, 32), Quantization(4, (32,)))
    assert not can_take(torch.randn(1, 1, 31), Quantization(4, (32,)))
    assert not can_take(torch.randn(1, 1, 40), Quantization(3, (40,)))
    assert not can_take(torch.randn(1, 1, 32, requires_grad=True), Quantization(4, (32,)))


@pytest.mark.parametrize("write", [launch_encode_into, encode_into])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("slots", [[6, 0, 4], [5, 6, 7]])
def test_new_tokens_are_quantised_into_places_of_a_cache_and_no_others_change(slots, write, symmetric):
    latents, behind = torch.randn(2, 3, 48, device=DEVICE), slots == [5, 6, 7]
    quantization = Quantization(4, (32, 16), symmetric)
    codes = torch.randint(256, (2, 9, 24), device=DEVICE, dtype=torch.uint8)
    parameters = torch.randn(2, 9, 2 if symmetric else 4, device=DEVICE).half()
    wanted = [codes.clone(), parameters.clone()]
    wanted[0][:, slots], wanted[1][:, slots] = reference_encode(latents, quantization)
    if behind:
        write(codes[:, 5:8], parameters[:, 5:8], latents, quantization)
    else:
        write(codes, parameters, latents, quantization, torch.tensor(slots, device=DEVICE))
    assert torch.equal(codes, wanted[0])
    assert torch.equal(parameters, wanted[1])


def packed_latents(bits, symmetric, widths):
    """Random codes of two rows of 9 tokens, of which the middle ones, with neighbours on both sides."""
    latents = torch.randn(2, 9, sum(widths)) * 3 + (torch.arange(sum(widths)) == 1)
    return to_device(quantize(latents, Quantization(bits, widths, symmetric)), DEVICE).narrow(1, 1, 7)


@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("widths", [(40, 16, 8), (33, 5, 1100)], ids=str)
def test_numbers_of_codes_equal_the_definition(bits, symmetric, widths, monkeypatch):
    packed = packed_latents(bits, symmetric, widths)
    monkeypatch.setenv("PALU_FORCE_REFERENCE", "1")
    for dtype in (torch.float32, torch.float16):
        got = launch_dequantized(packed, dtype, range(3))
        assert got.dtype == dtype
        assert torch.allclose(got, packed.dequantized(dtype), rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)
    last = launch_dequantized(packed, torch.float32, range(1, 3))
    assert torch.equal(last, launch_dequantized(packed, torch.float32, range(3))[..., widths[0] :])
    assert launch_dequantized(packed.narrow(1, 0, 0), torch.float32, range(3)).shape == (2, 0, sum(widths))


@pytest.mark.parametrize("span", [None, (16, 48), (56, 72)])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_rebuilding_from_numbers_of_codes_equals_the_definition(span, mixed, has_bias, monkeypatch):
    ranks = (16, 48, 32)
    packed = packed_latents(4, False, ranks)
    latents = MixedLatents((torch.randn(2, 2, 96, device=DEVICE), packed)) if mixed else packed
    up = torch.randn(32, 96, device=DEVICE)
    bias = torch.randn(96, device=DEVICE) if has_bias else None
    monkeypatch.setenv("PALU_FORCE_REFERENCE", "1")
    expected = reconstruct(latents, up, ranks, bias, span)
    monkeypatch.setattr(op, "uses_kernels", lambda tensor: True)
    assert torch.allclose(op.reconstruct(latents, up, ranks, bias, span), expected, rtol=1e-4, atol=1e-4)
