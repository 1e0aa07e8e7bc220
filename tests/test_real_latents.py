"""The kernels on latents of a real model: the bundled checkpoint, reading its evaluation text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import palu
from palu.calibrate.windows import CalibrationWindows
from palu.kernels.decode_attention.launch import decode_attention
from palu.kernels.decode_attention.reference import decode_attention as reference
from palu.kernels.latents import LatentProjection, dense
from palu.nn import latent_attention
from palu.nn.latent_cache import LatentCache

DEMO = Path(__file__).resolve().parents[1] / "assets" / "demo"
ON_GPU = torch.cuda.is_available()
# Rows and tokens: few where Triton interprets the kernels.
BATCH, LENGTH = (2, 1500) if ON_GPU else (1, 200)
# Of all layers, the root of the mean square.
LARGEST_ERROR = 2e-3


def windows_of(name, count, length):
    """Tokens of a part of one of the bundled texts, [count, length]."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / name).read_text()[: 8 * count * length]
    return tokenizer(text, return_tensors="pt").input_ids[0, : count * length].view(count, length)


@pytest.fixture(scope="module")
def latent_model():
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float16)
    windows = windows_of("calibration.txt", 8, 256)
    # Four kv heads per group, half of the cache.
    settings = {"head_group_size": 4, "decompose_method": "whiten", "search_method": "uniform", "rank_multiple": 16}
    config = palu.CompressionConfig(param_ratio_target=0.5, **settings)
    windows = CalibrationWindows(windows, None)
    return palu.compress(model.to("cuda" if ON_GPU else "cpu"), config=config, windows=windows).model


def attention_calls(model, monkeypatch):
    """The arguments of every layer's attention for the token after a part of the text."""
    ids = windows_of("evaluation.txt", BATCH, LENGTH).to(model.device)
    cache, calls, computed = LatentCache(model.config), [], latent_attention.decode_attention

    def noting(*args, **keywords):
        calls.append(args)
        return computed(*args, **keywords)

    model(ids[:, :-1], past_key_values=cache)
    monkeypatch.setattr(latent_attention, "decode_attention", noting)
    model(ids[:, -1:], past_key_values=cache)
    return calls


def in_float64(projection):
    """A projection's numbers as they are, in float64."""
    up, bias = (None if part is None else part.double() for part in (projection.up, projection.bias))
    return LatentProjection(up, projection.ranks, bias)


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_errors_of_a_real_models_attention_stay_small(latent_model, bits, monkeypatch):
    palu.set_quantization(latent_model, palu.QuantizationConfig(bits, bits))
    calls = attention_calls(latent_model, monkeypatch)
    assert len(calls) == len(latent_model.model.layers)
    errors = []
    for query, key_latents, value_latents, key, value, *rest in calls:
        output = decode_attention(query, key_latents, value_latents, key, value, *rest)
        latents = (dense(part, torch.float64) for part in (key_latents, value_latents))
        expected, _ = reference(query.double(), *latents, in_float64(key), in_float64(value), *rest)
        errors.append((output.double() - expected).norm() / expected.norm())
    assert torch.stack(errors).square().mean().sqrt() <= LARGEST_ERROR
