"""Kernels over packed latents, and where nothing is rotated or much is hidden, against the float64 definition."""

import pytest
import torch

from palu.kernels.decode_attention import launch
from palu.kernels.decode_attention.spec import Shape
from palu.kernels.latent_scores.launch import LOG2_E, launch_scores
from palu.kernels.latent_scores.op import absorbed
from palu.kernels.latent_scores.reference import latent_scores
from palu.kernels.latent_scores.spec import ABSORBED_SHAPES
from palu.kernels.latent_scores.spec import SHAPES as SCORE_SHAPES
from palu.kernels.latents import LatentProjection, MixedLatents, dense
from palu.kernels.quantize import Quantization, quantization_widths, quantize
from palu.kernels.rotation import Rotation
from tests.kernel_calls import KERNEL_SHAPES, RandomNorm, close, defined, name_of, on_device, quantized, random_call

pytestmark = pytest.mark.usefixtures("empty_memory_is_nan")

LONG = Shape(2, 2, 2, 64, 1, 700, (32,), (32,))


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=name_of)
@pytest.mark.parametrize(("symmetric", "gapless"), [(True, False), (False, True)], ids=["symmetric", "gapless"])
def test_kernels_read_packed_latents_beside_exact_ones(shape, bits, symmetric, gapless):
    query, *latents, key, value, rotation, mask = random_call(shape, torch.float32, True, gapless)
    mixed, held = [], []
    for latent, ranks in zip(latents, (shape.key_ranks, shape.value_ranks), strict=True):
        packed = quantize(latent * 3 + 0.2, Quantization(bits, tuple(ranks), symmetric))
        if shape.length < 8:
            mixed.append(packed)
        else:
            middle = packed.narrow(1, 3, shape.length - 5)
            mixed.append(MixedLatents((latent[:, :3], middle, latent[:, -2:])))
        held.append(dense(mixed[-1], torch.float32))
    expected = defined(query, *held, key, value, rotation, mask, 0.1, shape, None)
    call = on_device(query, *mixed, key, value, rotation, mask)
    assert launch.can_take(*call, None)
    assert close(launch.decode_attention(*call, 0.1), expected, "float32")


@torch.no_grad()
@pytest.mark.parametrize("exact", [0, 3])
def test_kernels_read_codes_with_several_scales_per_head_group(exact):
    shape = Shape(2, 4, 2, 64, 1, 130, (48,), (64,))
    query, *latents, key, value, rotation, mask = random_call(shape, torch.float32, True)
    given, held = [], []
    for latent, ranks in zip(latents, (shape.key_ranks, shape.value_ranks), strict=True):
        packed = quantize(latent * 3 + 0.2, Quantization(3, quantization_widths(ranks, 16)))
        some = MixedLatents((latent[:, :exact], packed.narrow(1, exact, shape.length - exact)))
        given.append(some if exact else packed)
        held.append(dense(given[-1], torch.float32))
    expected = defined(query, *held, key, value, rotation, mask, 0.1, shape, None)
    call = on_device(query, *given, key, value, rotation, mask)
    assert launch.can_take(*call, None)
    assert close(launch.decode_attention(*call, 0.1), expected, "float32")


@torch.no_grad()
@pytest.mark.parametrize("shape", SCORE_SHAPES, ids=name_of)
@pytest.mark.parametrize("gapless", [True, False], ids=["gapless", "gaps"])
def test_scores_equal_the_reference_in_float64(shape, gapless):
    query, latents, _, key, _, rotation, _ = random_call(shape, torch.float32, True, gapless, attention_scaling=1.3)
    exact = Rotation(rotation.positions, rotation.frequencies.double(), rotation.attention_scaling)
    precise = LatentProjection(key.up.double(), key.ranks, key.bias.double())
    expected = latent_scores(query.double() * 0.3, latents.double(), precise, exact)
    rows = query.transpose(1, 2).flatten(0, 1).contiguous()
    rows, latents, key, rotation = on_device(rows, latents, key, rotation)
    found = launch_scores(rows, latents, key, rotation, None, shape.queries, 0.3)
    scores = found.by_head(shape.num_heads, [shape.length]).unflatten(0, (shape.batch, shape.queries)) / LOG2_E
    assert close(scores.transpose(1, 2), expected, "float32")


@torch.no_grad()
@pytest.mark.parametrize("shape", ABSORBED_SHAPES, ids=name_of)
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("given", ["factor", "absorbed query"])
def test_models_without_rotation(shape, bits, given):
    query, *latents, key, value, _, mask = random_call(shape, torch.float32, True)
    latents, held = quantized(latents, bits, key, value)
    expected = defined(query, *held, key, value, None, mask, 0.1, shape, None)
    head_dim = None
    if given == "absorbed query":
        (query, key), head_dim = absorbed(query, key), shape.head_dim
    call = on_device(query, *latents, key, value, None, mask)
    assert launch.can_take(*call, None)
    assert close(launch.decode_attention(*call, 0.1, head_dim=head_dim), expected, "float32")


def padded_left(positions, mask):
    """One row of 600 pads at position 0, whose end shares a block with tokens; blocks of the other hidden inside."""
    positions[0] = (torch.arange(LONG.length) - 600).clamp(min=0)
    positions[1] = torch.arange(LONG.length)
    mask[:] = True
    mask[0, ..., :600] = False
    mask[1, ..., 128:512] = False


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("variant", ["rotated", "key norm", "no rotation"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_hidden_blocks_and_left_padding_do_not_count(bits, variant, additive):
    query, *latents, key, value, rotation, mask = random_call(LONG, torch.float32, False)
    padded_left(rotation.positions, mask)
    rotation = None if variant == "no rotation" else rotation
    norm = RandomNorm(LONG.head_dim) if variant == "key norm" else None
    latents, held = quantized(latents, bits, key, value)
    expected = defined(query, *held, key, value, rotation, mask, 0.1, LONG, norm)
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    call = on_device(query, *latents, key, value, rotation, given)
    norm = None if norm is None else norm.to(call[0].device)
    output = launch.decode_attention(*call, 0.1, norm)
    assert not output.isnan().any()
    assert close(output, expected, "float32")


@torch.no_grad()
def test_a_row_that_sees_nothing_spoils_neither_itself_nor_others():
    shape = Shape(2, 2, 2, 64, 1, 100, (32,), (32,))
    *call, mask = random_call(shape, torch.float32, False, gapless=True)
    expected = defined(*call, mask, 0.1, shape, None)
    mask[0] = False
    output = launch.decode_attention(*on_device(*call, mask), 0.1)
    assert torch.isfinite(output).all()
    assert close(output[1], expected[1], "float32")


@torch.no_grad()
@pytest.mark.parametrize("gapless", [True, False], ids=["gapless", "gaps"])
@pytest.mark.parametrize("variant", ["plain", "key norm"])
def test_what_yarn_scales_scores_with_is_applied_once(gapless, variant):
    shape = Shape(1, 4, 4, 64, 1, 100, (48, 32), (32, 32))
    norm = RandomNorm(shape.head_dim) if variant == "key norm" else None
    call = random_call(shape, torch.float32, True, gapless, attention_scaling=1.35)
    expected = defined(*call, 0.5, shape, norm)
    call = on_device(*call)
    norm = None if norm is None else norm.to(call[0].device)
    assert close(launch.decode_attention(*call, 0.5, norm), expected, "float32")


@torch.no_grad()
@pytest.mark.parametrize("num_heads", [3, 4])
def test_weights_read_no_scale_of_a_value_behind_the_last(num_heads, monkeypatch):
    made = torch.Tensor.new_empty
    # What memory held before is any number.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: made(*args, **options).fill_(1.0))
    shape = Shape(1, num_heads, 1, 64, 1, 65, (32,), (32,))
    query, keys, values, key, value, rotation, _ = random_call(shape, torch.float32, False, gapless=True)
    packed = quantize(torch.cat([values, values], 1), Quantization(4, (32,)))
    for parameters in (packed.scales, packed.zeros):
        parameters[:, shape.length :] = float("nan")
    packed = packed.narrow(1, 0, shape.length)
    rows, keys, packed, key, value, rotation = on_device(query[:, :, 0], keys, packed, key, value, rotation)
    scores = launch_scores(rows, keys, key, rotation, None, 1, 1.0)
    parts = launch.launch_values(scores, packed, value, rows, 1, len(key.ranks))
    assert not torch.cat([part.flatten() for part in parts]).isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 4])
def test_values_of_a_stretch_that_is_hidden_are_not_read(bits):
    query, *latents, key, value, rotation, mask = random_call(LONG, torch.float32, False, gapless=True)
    mask[:] = True
    mask[..., 128:512] = False
    latents, held = quantized(latents, bits, key, value)
    expected = defined(query, *held, key, value, rotation, mask, 0.1, LONG, None)
    hidden = latents[1] if bits == 16 else latents[1].scales
    hidden[:, 128:512] = float("nan")
    call = on_device(query, *latents, key, value, rotation, mask)
    assert close(launch.decode_attention(*call, 0.1), expected, "float32")
