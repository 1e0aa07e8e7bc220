"""The quantisation kernel against its definition in PyTorch."""

import pytest
import torch

from palu.kernels.quantization.launch import can_take, launch_encode, launch_encode_into
from palu.kernels.quantize import Quantization, encode, encode_into, reference_encode

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


def test_groups_that_straddle_bytes_and_latents_with_gradients_are_left_to_the_definition():
    assert not can_take(torch.randn(1, 1, 40), Quantization(3, (40,)))
    assert not can_take(torch.randn(1, 1, 32, requires_grad=True), Quantization(4, (32,)))


@pytest.mark.parametrize("write", [launch_encode_into, encode_into])
@pytest.mark.parametrize("symmetric", [False, True])
def test_new_tokens_are_quantised_into_slots_of_a_cache_and_no_others_change(write, symmetric):
    latents, slots = torch.randn(2, 3, 48, device=DEVICE), torch.tensor([6, 0, 4], device=DEVICE)
    quantization = Quantization(4, (32, 16), symmetric)
    codes = torch.randint(256, (2, 9, 24), device=DEVICE, dtype=torch.uint8)
    parameters = torch.randn(2, 9, 2 if symmetric else 4, device=DEVICE).half()
    wanted = [codes.clone(), parameters.clone()]
    wanted[0][:, slots], wanted[1][:, slots] = reference_encode(latents, quantization)
    write(codes, parameters, slots, latents, quantization)
    assert torch.equal(codes, wanted[0])
    assert torch.equal(parameters, wanted[1])
