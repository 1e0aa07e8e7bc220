"""What only a GPU can show; skipped elsewhere."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from palu.checkpoint import save_checkpoint
from tests.helpers import FAMILIES, compressed, left_padded_batch, random_windows, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("implementation", [None, "static"], ids=["growing", "compiled, fixed capacity"])
def test_greedy_tokens_equal_on_the_gpu(family, implementation):
    model = tiny_model(family).cuda()
    latent = compressed(model).model
    batch = {name: tensor.cuda() for name, tensor in left_padded_batch(model).items()}
    expected = model.generate(**batch, max_new_tokens=32, do_sample=False)
    got = latent.generate(**batch, max_new_tokens=32, do_sample=False, cache_implementation=implementation)
    assert torch.equal(expected, got)


@torch.no_grad()
def test_whitening_on_the_gpu_agrees_with_the_cpu():
    model = tiny_model("llama")
    ids = random_windows(model, 2, 30)
    options = {"ratio": 0.5, "decompose_method": "whiten", "search_method": "fisher_uniform"}
    on_cpu = compressed(model, **options)
    on_gpu = compressed(tiny_model("llama").cuda(), **options)
    assert on_cpu.plan == on_gpu.plan
    assert torch.allclose(on_cpu.model(ids).logits, on_gpu.model(ids.cuda()).logits.cpu(), atol=1e-3)


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_layers_spread_over_two_gpus_generate_the_same_tokens(family, tmp_path):
    model = tiny_model(family)
    save_checkpoint(compressed(model).model, None, tmp_path / "c")
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    device_map |= {f"model.layers.{layer}": int(layer > 0) for layer in range(3)}
    latent = AutoModelForCausalLM.from_pretrained(tmp_path / "c", device_map=device_map)
    assert len({parameter.device for parameter in latent.parameters()}) == 2
    batch = {name: tensor.cuda() for name, tensor in left_padded_batch(model).items()}
    expected = model.cuda().generate(**batch, max_new_tokens=24, do_sample=False)
    assert torch.equal(expected, latent.generate(**batch, max_new_tokens=24, do_sample=False))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_spread_over_two_gpus_is_compressed_as_on_one(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "stock")
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    device_map |= {f"model.layers.{layer}": int(layer > 0) for layer in range(3)}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", device_map=device_map)
    options = {"ratio": 0.5, "decompose_method": "whiten", "search_method": "fisher_uniform"}
    expected, got = compressed(model.cuda(), **options), compressed(spread, **options)
    assert expected.plan == got.plan
    save_checkpoint(got.model, None, tmp_path / "c")
    ids = random_windows(model, 2, 30).cuda()
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "c", device_map={"": 0})
        assert torch.allclose(loaded(ids).logits, expected.model(ids).logits, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 9])
def test_short_prompts_with_a_fixed_capacity_on_the_gpu(length):
    model = tiny_model("mistral").cuda()
    latent = compressed(model).model
    ids = random_windows(model, 2, length).cuda()
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    options = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(expected, latent.generate(ids, **options))
