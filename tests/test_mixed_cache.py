"""Exact sinks and newest tokens beside packed codes."""

import pytest
import torch

import palu
from palu.core.errors import PaluError
from palu.kernels.latents import dense
from palu.kernels.quantize import Quantization, quantize
from palu.nn.latent_cache import LatentCache
from palu.nn.packed_buffer import MixedBuffer
from tests.helpers import FAMILIES, compressed, left_padded_batch, random_windows, tiny_model

WIDTHS = (5, 8)


def mixed(family, sinks, window, bits=2):
    """A tiny compressed model whose cache holds codes but for the first and newest tokens; float64."""
    latent = compressed(tiny_model(family), 0.75).model.double()
    palu.set_quantization(latent, palu.QuantizationConfig(bits, bits, sinks=sinks, window=window))
    return latent


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window", [0, 1, 6])
def test_tokens_age_from_exact_to_codes_however_they_come(sinks, window):
    quantization = Quantization(3, WIDTHS)
    tokens = torch.randn(2, 60, sum(WIDTHS), dtype=torch.float64)
    rounded = quantize(tokens, quantization).dequantized(torch.float64)
    buffer = MixedBuffer(quantization, sinks, window)
    held = 0
    while held < tokens.shape[1]:
        new = min(int(torch.randint(1, 9, ())), tokens.shape[1] - held)
        buffer.append(tokens[:, held : held + new])
        held += new
        expected = rounded[:, :held].clone()
        expected[:, :sinks] = tokens[:, : min(sinks, held)]
        if window:
            expected[:, -window:] = tokens[:, max(0, held - window) : held]
        count = int(torch.randint(1, held + 1, ()))
        assert len(buffer) == held
        assert torch.equal(dense(buffer.last(count), torch.float64), expected[:, -count:])
    exact = min(sinks + window, 60)
    assert buffer.nbytes == 2 * (exact * sum(WIDTHS) * 8 + (60 - exact) * quantization.bytes_per_token)


def test_dropping_tokens_at_both_ends_and_going_on():
    quantization = Quantization(8, WIDTHS)
    tokens = torch.randn(1, 40, sum(WIDTHS))
    buffer = MixedBuffer(quantization, 4, 4)
    buffer.append(tokens[:, :20])
    buffer.drop_back(18)
    assert torch.equal(dense(buffer.last(2), torch.float32), tokens[:, :2])
    buffer.append(tokens[:, 2:30])
    assert torch.equal(dense(buffer.last(30), torch.float32)[:, :4], tokens[:, :4])
    assert torch.equal(dense(buffer.last(4), torch.float32), tokens[:, 26:30])
    buffer.drop_front(10)
    assert len(buffer) == 20
    buffer.append(tokens[:, 30:])
    assert torch.allclose(dense(buffer.last(30), torch.float32), tokens[:, 10:], atol=0.05)
    buffer.select_rows(torch.tensor([0, 0]))
    assert buffer.rows == 2
    buffer.clear()
    assert len(buffer) == buffer.nbytes == 0


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("exact", [{"sinks": 0, "window": 60}, {"sinks": 60, "window": 0}], ids=["window", "sinks"])
def test_a_window_over_everything_is_the_exact_model(family, exact):
    latent = mixed(family, **exact)
    batch = left_padded_batch(latent)
    settings = {"max_new_tokens": 30, "do_sample": False}
    got = latent.generate(**batch, **settings)
    palu.set_quantization(latent, palu.QuantizationConfig())
    assert torch.equal(got, latent.generate(**batch, **settings))


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_step_reads_sinks_and_window_exactly_and_the_rest_as_codes(family):
    latent, plain = mixed(family, 2, 3, bits=4), mixed(family, 0, 0, bits=16)
    ids = random_windows(latent, 2, 30)
    caches = [LatentCache(model.config) for model in (latent, plain)]
    for chunk in ids.split([7, 1, 9, 1, 1, 11], dim=1):
        for model, cache in zip((latent, plain), caches, strict=True):
            logits = model(chunk, past_key_values=cache).logits
            assert torch.isfinite(logits).all()
    # Only the first layer's latents do not depend on what earlier layers read from their cache.
    got, exact = (cache.layers[0].key_buffer for cache in caches)
    length = len(exact)
    assert len(got) == length
    got, exact = dense(got.last(length), torch.float64), exact.tokens
    same = (got == exact).all(-1).all(0)
    sinks = 2 if length == 30 else 0  # a sliding layer has forgotten them
    assert same.tolist() == [index < sinks or index >= length - 3 for index in range(length)]
    assert (got - exact).abs().max() < exact.abs().max()


@torch.no_grad()
def test_bytes_count_exact_tokens_too():
    latent = mixed("llama", 2, 3, bits=4)
    cache = latent(random_windows(latent, 3, 40)).past_key_values
    exact, codes = 0, 0
    for layer in latent.config.latent.layers:
        for ranks in (layer.key, layer.value):
            exact += sum(ranks) * 8
            codes += sum(ranks) // 2 + 4 * len(ranks)
    assert cache.nbytes() == 3 * (5 * exact + 35 * codes + 40 * 4)


@torch.no_grad()
def test_beams_prompt_lookup_and_sampling_work_beside_exact_tokens():
    latent = mixed("llama", 2, 8, bits=8)
    ids = random_windows(latent, 1, 20)
    expected = latent.generate(ids, max_new_tokens=30, do_sample=False)
    looked_up = latent.generate(ids, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=3)
    assert looked_up.shape == expected.shape
    assert latent.generate(ids, max_new_tokens=10, do_sample=False, num_beams=3).shape == (1, 30)
    assert latent.generate(ids, max_new_tokens=10, do_sample=True).shape == (1, 30)


def test_a_cache_of_fixed_capacity_refuses_exact_tokens():
    latent = mixed("llama", 2, 0)
    with pytest.raises(PaluError, match="lt_window and lt_sinks need a growing cache"):
        LatentCache(latent.config, capacity=64)
    with pytest.raises(PaluError, match="lt_window and lt_sinks need a growing cache"):
        latent.generate(random_windows(latent, 1, 4), max_new_tokens=4, cache_implementation="static")
