"""Steps of whole models over caches that are filled by hand: every token counts, and counters can be set back."""

import pytest
import torch
from transformers import DynamicCache

import palu
from palu.config import LatentConfig
from palu.nn.latent_cache import LatentCache
from utils import latency_model
from utils.random_models import latent_model, stock_model


def tiny_models(bits=16):
    stock = stock_model("tiny", torch.float32, "cpu")
    latents = latent_model(stock.config, torch.float32, "cpu", 0.5, 4, 0.75)
    palu.set_quantization(latents, palu.QuantizationConfig(bits, bits))
    return stock, latents


@torch.no_grad()
def test_a_step_of_the_stock_model_attends_to_the_whole_filled_cache():
    model, _ = tiny_models()
    plain = DynamicCache()
    latency_model.attend_without_mask(model, "sdpa")
    cache = latency_model.filled_cache(model, 2, 19)
    token = torch.tensor([[3], [200]])
    call = latency_model.step_call(model, cache, token, 19)
    for index, layer in enumerate(cache.layers):
        plain.update(layer.keys[:, :, :19].clone(), layer.values[:, :, :19].clone(), index)
    logits = call()
    assert int(cache.get_seq_length()) == 20
    latency_model.set_length(cache, 19)
    assert torch.equal(call(), logits)
    model.set_attn_implementation("sdpa")
    expected = model(token, past_key_values=plain, position_ids=torch.full((2, 1), 19)).logits
    assert torch.allclose(logits, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 8, 3])
def test_a_step_over_latents_attends_to_the_whole_filled_cache(bits, monkeypatch):
    monkeypatch.setattr(latency_model, "PIECE", 7 * 2 * 32)
    _, model = tiny_models(bits)
    latency_model.attend_without_mask(model, "sdpa")
    cache = latency_model.filled_cache(model, 2, 19)
    token = torch.tensor([[3], [200]])
    call = latency_model.step_call(model, cache, token, 19)
    growing = LatentCache(model.config)
    for layer, full in zip(growing.layers, cache.layers, strict=True):
        copy_tokens(layer, full, 19)
    logits = call()
    assert int(cache.get_seq_length()) == 20
    assert cache.layers[1].positions.tolist() == [list(range(20))] * 2
    latency_model.set_length(cache, 19)
    assert torch.equal(call(), logits)
    model.set_attn_implementation("sdpa")
    expected = model(token, past_key_values=growing, position_ids=torch.full((2, 1), 19)).logits
    assert torch.allclose(logits, expected, atol=1e-4)


def copy_tokens(layer, full, count):
    """Make a growing layer hold the first tokens of a full one."""
    layer.lazy_initialization(torch.empty(2, 1, 1), torch.empty(2, 1, 1))
    for mine, other in zip(layer.buffers, full.buffers, strict=True):
        for part, source in zip(mine.parts, other.parts, strict=True):
            assert source.storage.float().std() > 0
            part.append(source.storage[:, :count].clone())
    layer.cumulative_length = count


@torch.no_grad()
def test_latents_of_every_token_are_random_and_not_zero():
    _, model = tiny_models(4)
    cache = latency_model.filled_cache(model, 1, 50)
    codes, parameters = (part.storage for part in cache.layers[0].key_buffer.parts)
    scales = parameters[..., 0::2]
    assert codes.shape[1] == 51
    assert float(scales.min()) > 0.1
    assert codes.float().std(dim=-1).min() > 0
    ranks = LatentConfig.from_dict(model.config.palu).layers[0]
    assert (sum(ranks.key), sum(ranks.value)) == (32, 96)
