"""Codes, packing and scales."""

import pytest
import torch

from palu.core.errors import PaluError
from palu.core.hadamard import hadamard, is_reachable, nearest_reachable
from palu.kernels.packing import PLANES, pack, packed_width, unpack
from palu.kernels.quantize import Quantization, quantization_widths, quantize


@pytest.mark.parametrize("bits", list(PLANES))
@pytest.mark.parametrize("width", [1, 7, 8, 31, 96, 97, 1000])
def test_unpack_is_the_exact_inverse_of_pack(bits, width):
    codes = torch.randint(0, 2**bits, (2, 3, width), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, packed_width(width, bits))
    assert torch.equal(unpack(packed, width, bits), codes)


@pytest.mark.parametrize("bits", list(PLANES))
def test_packing_wastes_nothing_but_the_last_bytes(bits):
    assert packed_width(96, bits) == 96 * bits // 8
    assert packed_width(97, bits) <= 97 * bits / 8 + len(PLANES[bits])


@pytest.mark.parametrize("bits", list(PLANES))
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_error_is_at_most_half_a_step(bits, symmetric):
    widths = (33, 1, 64)
    latents = torch.randn(3, 50, 98) * torch.tensor([0.01, 3.0, 40.0]).repeat_interleave(torch.tensor(widths))
    packed = quantize(latents, Quantization(bits, widths, symmetric))
    error = (packed.dequantized(torch.float32) - latents).abs().split(list(widths), dim=-1)
    for group, (values, difference) in enumerate(zip(latents.split(list(widths), dim=-1), error, strict=True)):
        step = packed.scales[..., group].float()[..., None]
        rounding = values.abs().amax(-1, keepdim=True) * 2**-10
        assert (difference <= 0.5 * step * 1.01 + rounding).all()
    assert packed.shape == latents.shape
    held = packed.codes.nbytes + packed.scales.nbytes + (0 if symmetric else packed.zeros.nbytes)
    assert held == 150 * packed.quantization.bytes_per_token


@pytest.mark.parametrize("value", [0.0, 1e-6, 10.0, -700.0])
@pytest.mark.parametrize("bits", list(PLANES))
def test_constant_groups_are_kept_to_half_precision(value, bits):
    latents = torch.full((1, 2, 16), value)
    restored = quantize(latents, Quantization(bits, (16,))).dequantized(torch.float32)
    assert torch.allclose(restored, latents, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("bits", list(PLANES))
@pytest.mark.parametrize("fine_zeros", [False, True])
def test_codes_less_their_zero_points_are_exact_in_half_precision_from_four_bits_on(bits, fine_zeros):
    # Of some tokens the group's range is tiny beside its magnitude.
    latents = torch.randn(2, 50, 64) * 10 ** torch.linspace(-3, 1, 50)[:, None] + torch.randn(2, 50, 1)
    packed = quantize(latents, Quantization(bits, (64,), fine_zeros=fine_zeros))
    assert torch.equal(packed.zeros, packed.zeros.round()) == (bits >= 4 and not fine_zeros)
    if packed.quantization.whole_zeros:
        assert packed.zeros.abs().amax() <= 1024
        exact = packed.unpacked().double() - packed.zeros.double()
        assert torch.equal((packed.unpacked().half() - packed.zeros).double(), exact)


def test_clipping_shrinks_the_step_and_saturates():
    latents = torch.randn(1, 10, 64)
    full, clipped = (quantize(latents, Quantization(4, (64,), clip_ratios=(ratio,))) for ratio in (1.0, 0.5))
    assert torch.allclose(clipped.scales.float(), 0.5 * full.scales.float(), rtol=2e-3)
    assert clipped.dequantized(torch.float32).amax() < latents.amax()


def test_pieces_inside_a_group_never_cross_its_border():
    assert quantization_widths((96, 32), None) == (96, 32)
    assert quantization_widths((96, 40), 64) == (64, 32, 40)


def test_hadamard_matrices_exist_for_nearly_every_multiple_of_32():
    reachable = [order for order in range(32, 2049, 32) if is_reachable(order)]
    assert set(range(32, 2049, 32)) - set(reachable) == {1888}
    for order in (1, 2, 4, 12, 20, 28, 36, 52, 100, 148, 244, 364, 500, *reachable[::5]):
        matrix = hadamard(order)
        assert set(matrix.unique().tolist()) <= {-1, 1}
        product = matrix.double() @ matrix.double().T
        assert torch.equal(product, order * torch.eye(order, dtype=torch.float64))


def test_an_order_that_no_construction_reaches_names_the_nearest():
    with pytest.raises(PaluError, match=r"order 92 can be constructed; the nearest is (88|96)"):
        hadamard(92)
    near = [order for order in range(1800, 1980) if is_reachable(order)]
    assert nearest_reachable(1888) == min(near, key=lambda order: (abs(order - 1888), order))
