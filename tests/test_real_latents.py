"""The kernels on latents of a real model: the bundled checkpoint, reading its evaluation text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import palu
from palu.kernels.decode_attention.launch import decode_attention
from palu.kernels.decode_attention.reference import decode_attention as reference
from palu.kernels.latents import LatentProjection, dense
from palu.nn import latent_attention
from palu.nn.latent_cache import LatentCache
from tests.helpers import compressed

DEMO = Path(__file__).resolve().parents[1] / "assets" / "demo"
ON_GPU = torch.cuda.is_available()
# Rows and tokens: few where Triton interprets the kernels. Of much fewer, errors average less (1.9e-3 of 70 tokens).
BATCH, LENGTH = (2, 1500) if ON_GPU else (1, 200)
LARGEST_ERROR = 2e-3


@pytest.fixture(scope="module")
def latent_model():
    # Four kv heads per group, half of the cache.
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float16)
    return compressed(model.to("cuda" if ON_GPU else "cpu"), 0.5, head_group_size=4, rank_multiple=16).model


def attention_calls(model, monkeypatch):
    """The arguments of every layer's attention for the token after a part of the text."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "evaluation.txt").read_text()[:50_000]
    ids = tokenizer(text, return_tensors="pt").input_ids[0, : BATCH * LENGTH].view(BATCH, LENGTH).to(model.device)
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
def test_errors_of_a_real_models_layers_stay_small(latent_model, bits, monkeypatch):
    palu.set_quantization(latent_model, palu.QuantizationConfig(bits, bits))
    calls = attention_calls(latent_model, monkeypatch)
    assert len(calls) == len(latent_model.model.layers)
    for query, key_latents, value_latents, key, value, *rest in calls:
        output = decode_attention(query, key_latents, value_latents, key, value, *rest)
        latents = (dense(part, torch.float64) for part in (key_latents, value_latents))
        expected, _ = reference(query.double(), *latents, in_float64(key), in_float64(value), *rest)
        assert (output.double() - expected).norm() <= LARGEST_ERROR * expected.norm()
