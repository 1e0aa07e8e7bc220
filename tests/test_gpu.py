"""What only a GPU can show; skipped elsewhere."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import palu
from palu.checkpoint import save_checkpoint
from palu.kernels.decode_attention import launch, reference
from palu.nn.latent_cache import LatentCache
from palu.token_sparsity import METHOD_SETTINGS
from tests.helpers import FAMILIES, compressed, left_padded_batch, random_windows, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def errors(monkeypatch):
    """Of every call of the kernels of decode attention, its relative error to the reference of the same call.

    Whole runs with codes part where rounding tips one code or scale to the next.
    """
    found = []
    computed = launch.decode_attention

    def checked(*call):
        output = computed(*call)
        with monkeypatch.context() as definition:
            definition.setenv("PALU_FORCE_REFERENCE", "1")
            expected = reference.decode_attention(*call)[0]
        found.append(((output - expected).norm() / expected.norm()).item())
        return output

    monkeypatch.setattr(launch, "decode_attention", checked)
    return found


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
@pytest.mark.parametrize("family", ["llama-3.1", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_models_steps_go_through_the_kernels_and_agree_with_the_reference(family, bits, errors, monkeypatch):
    model = tiny_model(family, head_dim=64, hidden_size=512).cuda()
    latent = compressed(model, 0.75, rank_multiple=16, fuse_values=False).model
    palu.set_quantization(latent, palu.QuantizationConfig(bits, bits, window=0 if bits == 16 else 3))
    batch = {name: tensor.cuda() for name, tensor in left_padded_batch(model).items()}
    settings = {"max_new_tokens": 16, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got = latent.generate(**batch, **settings)
    assert len(errors) == 15 * len(latent.model.layers)
    assert max(errors, default=0.0) < 1e-3
    monkeypatch.setenv("PALU_FORCE_REFERENCE", "1")
    expected = latent.generate(**batch, **settings)
    assert len(errors) == 15 * len(latent.model.layers)
    if bits == 16:
        assert torch.allclose(*(torch.stack(output.logits)[:4] for output in (got, expected)), atol=1e-3)
        assert torch.equal(got.sequences, expected.sequences)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-3.1", "qwen3", "mistral"])
@pytest.mark.parametrize("method", METHOD_SETTINGS)
@pytest.mark.parametrize("bits", [16, 4])
def test_caches_that_drop_tokens_go_through_the_kernels_and_agree_with_the_reference(
    family, method, bits, errors, monkeypatch
):
    window = {"sliding_window": 30} if family == "mistral" else {}
    model = tiny_model(family, head_dim=64, hidden_size=512, **window).cuda()
    latent = compressed(model, 0.75, rank_multiple=16, fuse_values=False).model
    palu.set_quantization(latent, palu.QuantizationConfig(bits, bits))
    palu.set_token_sparsity(latent, palu.TokenSparsity(method, capacity_rate=0.5, window_size=4))
    batch = {name: tensor.cuda() for name, tensor in left_padded_batch(model, 40).items()}
    settings = {"max_new_tokens": 16, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got = latent.generate(**batch, **settings)
    # Windows of positions differ from group to group of heads, which the kernels' masks cannot say.
    layers = got.past_key_values.layers
    taken = [layer for layer in layers if not (layer.is_sliding and layer.has_dropped and layer.token_groups > 1)]
    assert len(errors) == 15 * len(taken)
    assert max(errors, default=0.0) < 1e-3
    monkeypatch.setenv("PALU_FORCE_REFERENCE", "1")
    expected = latent.generate(**batch, **settings)
    assert len(errors) == 15 * len(taken)
    if bits == 16:
        assert torch.allclose(*(torch.stack(output.logits)[:4] for output in (got, expected)), atol=1e-3)
        assert torch.equal(got.sequences, expected.sequences)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_compiled_model_of_fixed_capacity_goes_through_the_kernels_too(family, bits, monkeypatch):
    latent = compressed(tiny_model(family, head_dim=64, hidden_size=512).cuda(), 0.75, rank_multiple=16).model
    palu.set_quantization(latent, palu.QuantizationConfig(bits, bits))
    batch = {name: tensor.cuda() for name, tensor in left_padded_batch(latent).items()}
    settings = {"max_new_tokens": 16, "do_sample": False}
    got = latent.generate(**batch, **settings, cache_implementation="static")
    assert torch.equal(got, latent.generate(**batch, **settings))
    # With codes, the test above compares call by call.
    if bits == 16:
        monkeypatch.setenv("PALU_FORCE_REFERENCE", "1")
        assert torch.equal(got, latent.generate(**batch, **settings))


@torch.no_grad()
def test_a_step_can_be_captured_in_a_cuda_graph():
    latent = compressed(tiny_model("llama", head_dim=64, hidden_size=512).cuda(), 0.75, rank_multiple=16).model
    ids = random_windows(latent, 2, 40).cuda()
    expected = latent(ids).logits[:, -1]
    cache = LatentCache(latent.config, capacity=64)
    latent(ids[:, :39], past_key_values=cache)
    token, position = ids[:, 39:], torch.tensor([[39]], device="cuda")
    written = cache.layers[0].written.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        latent(token, past_key_values=cache, position_ids=position)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = latent(token, past_key_values=cache, position_ids=position).logits
    for layer in cache.layers:
        layer.written.copy_(written)
    graph.replay()
    assert torch.allclose(logits[:, -1], expected, atol=1e-3)


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
