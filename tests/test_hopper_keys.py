"""The decode kernel for compute capability 9: keys with biases, with a norm, with one large latent."""

import pytest
import torch

from palu.kernels.decode_attention.hopper import launch as hopper
from palu.kernels.decode_attention.spec import HOPPER_SHAPES, Shape
from palu.kernels.latents import LatentProjection
from palu.kernels.rotation import Rotation
from tests.hopper_calls import are_copied, checked, needs_hopper, noted_launches
from tests.kernel_calls import RandomNorm, name_of, quantized, random_call

BIASED, NORMED = ("biases", "both", "both, symmetric"), ("norm", "both", "both, symmetric")


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [shape for shape in HOPPER_SHAPES if shape.num_heads > shape.num_kv_heads], ids=name_of
)
@pytest.mark.parametrize("extra", ["biases", "norm", "both", "both, symmetric"])
def test_biases_and_norms_of_keys_are_part_of_them(shape, dtype, extra, bits, monkeypatch):
    if not are_copied(shape, bits):
        pytest.skip("groups do not begin where copies can")
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 3)
    # Positions without gaps: of other keys they would be interpolated.
    query, *latents, key, value, rotation, mask = random_call(shape, getattr(torch, dtype), extra != "norm", True)
    key = LatentProjection(key.up, key.ranks, None if key.bias is None else key.bias * 3)
    packed, held = quantized(latents, bits, key, value, symmetric="symmetric" in extra)
    norm = None if extra == "biases" else RandomNorm(shape.head_dim)
    checked((query, *packed, key, value, rotation), shape, mask, mask, dtype, monkeypatch, held, norm)


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("heads", [(32, 8, 128), (12, 4, 96), (16, 8, 64)], ids=lambda heads: "-".join(map(str, heads)))
@pytest.mark.parametrize("extra", ["nothing", "biases", "norm", "both", "both, symmetric"])
def test_two_programs_share_a_groups_heads_where_each_has_a_tile(heads, dtype, extra, bits, monkeypatch):
    groups = heads[1] // 4
    shape = Shape(2, *heads, 1, 300, (128, 64)[:groups], (384, 256)[:groups])
    query, *latents, key, value, rotation, mask = random_call(shape, getattr(torch, dtype), extra in BIASED, True)
    packed, held = quantized(latents, bits, key, value, symmetric="symmetric" in extra)
    norm = RandomNorm(shape.head_dim) if extra in NORMED else None
    launches = noted_launches(monkeypatch)
    checked((query, *packed, key, value, rotation), shape, mask, mask, dtype, monkeypatch, held, norm)
    assert [each.calls[0].kind.shares for each in launches] == [2]


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("size", [1e-3, 30.0, 1000.0])
@pytest.mark.parametrize("length", [300, 4000])
def test_large_and_small_up_factors_stay_in_range(size, length, bits, monkeypatch):
    shape = Shape(1, 32, 8, 128, 1, length, (128, 64), (384, 256))
    query, *latents, key, value, rotation, mask = random_call(shape, torch.float16, False, gapless=True)
    # Frequencies that let slow pairs be interpolated.
    rotation = Rotation(rotation.positions, 2e5 ** (-torch.arange(64) / 64))
    # Scores stay as large as they are.
    key, query = LatentProjection(key.up * size, key.ranks), query / size
    packed, held = quantized(latents, bits, key, value)
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 3)
    launches = noted_launches(monkeypatch)
    checked((query, *packed, key, value, rotation), shape, mask, mask, "float16", monkeypatch, held)
    assert [each.tables.window is not None for each in launches] == [length == 4000]


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("heads", [(32, 8, 128), (8, 8, 128), (6, 2, 96)], ids=lambda heads: "-".join(map(str, heads)))
@pytest.mark.parametrize("length", [300, 4000])
def test_a_large_latent_that_all_tokens_share_costs_little(heads, length, bits, monkeypatch):
    groups = max(1, heads[1] // 4)
    shape = Shape(1, *heads, 1, length, (128,) * groups, (384,) * groups)
    query, latents, values, key, value, rotation, mask = random_call(shape, torch.float16, False, gapless=True)
    latents = latents.unflatten(-1, (groups, 128)) * torch.linspace(1, 0.1, 128).to(latents)
    latents[..., 0] = 6 + latents[..., 0]
    given = [latents.flatten(-2), values]
    packed, held = quantized(given, bits, key, value)
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 3)
    checked((query, *packed, key, value, rotation), shape, mask, mask, "float16", monkeypatch, held)
