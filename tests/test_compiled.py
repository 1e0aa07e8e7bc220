"""Under torch.compile a decoding step is one graph, goes through the kernels, and is right step after step."""

import gc
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

import palu
from palu import LatentCache
from palu.kernels.apart import made_apart
from palu.kernels.decode_attention import compiled, launch, op
from palu.kernels.decode_attention.reference import decode_attention as reference
from palu.kernels.latent_scores import factors, layout
from palu.nn import rotary
from tests.helpers import compressed, random_windows, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, STEPS = 12, 3


@pytest.fixture
def launches(monkeypatch):
    """Counts calls of the kernels, in the place of which the definition computes where there is no GPU."""
    counted, launched = [], launch.decode_attention
    if not torch.cuda.is_available():
        launched = lambda *args: reference(*args)[0]  # noqa: E731
    for module in (op, rotary):
        monkeypatch.setattr(module, "uses_kernels", lambda tensor: True)
    monkeypatch.setattr(launch, "decode_attention", lambda *args: counted.append(1) or launched(*args))
    return counted


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "bits"), [("llama", 16), ("llama", 4), ("qwen2", 16), ("qwen3", 16), ("mistral", 16)]
)
def test_a_compiled_step_is_one_graph_of_kernel_calls(family, bits, launches):
    base = tiny_model(family, head_dim=64, hidden_size=256, num_hidden_layers=2).to(DEVICE)
    latent = compressed(base, 0.75, rank_multiple=16).model
    palu.set_quantization(latent, palu.QuantizationConfig(bits, bits))
    ids = random_windows(latent, 2, PROMPT + STEPS).to(DEVICE)
    cache, other = (LatentCache(latent.config, capacity=PROMPT + STEPS + 4) for _ in range(2))
    for each in (cache, other):
        latent(ids[:, :PROMPT], past_key_values=each)

    def step(token, position, cache=cache):
        return latent(token, past_key_values=cache, position_ids=position).logits

    torch._dynamo.reset()
    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    for index in range(STEPS):
        at = PROMPT + index
        position = torch.full((2, 1), at, device=DEVICE)
        launches.clear()
        logits = compiled_step(ids[:, at : at + 1], position)
        assert len(launches) == latent.config.num_hidden_layers
        assert torch.allclose(logits, step(ids[:, at : at + 1], position, other), atol=1e-4)
        if bits == 16:
            assert torch.allclose(logits[:, 0], latent(ids[:, : at + 1]).logits[:, -1], atol=1e-4)
    assert not compiled._tables


@torch.no_grad()
@pytest.mark.parametrize("capacity", [PROMPT, None], ids=["fixed", "growing"])
def test_a_first_call_may_be_a_compiled_one(capacity):
    latent = compressed(tiny_model("llama", num_hidden_layers=1), 0.75).model
    ids = random_windows(latent, 2, PROMPT)
    palu.set_quantization(latent, palu.QuantizationConfig(4, 4))
    expected = latent(ids, past_key_values=LatentCache(latent.config, capacity=capacity)).logits
    # Anew, so that nothing has been worked out yet.
    palu.set_quantization(latent, palu.QuantizationConfig(4, 4))
    cache = LatentCache(latent.config, capacity=capacity)
    torch._dynamo.reset()
    first = torch.compile(lambda ids: latent(ids, past_key_values=cache).logits, fullgraph=True, backend="aot_eager")
    assert torch.allclose(first(ids), expected, atol=1e-4)


def test_nothing_is_made_by_another_thread_while_a_compiler_traces():
    def step(states):
        return states + made_apart(torch.device("cuda"), lambda: torch.ones(3))

    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(torch.zeros(3)), torch.ones(3))


def test_calls_of_finer_quantisation_do_not_travel():
    from palu.kernels.latents import LatentProjection
    from palu.kernels.quantize import Quantization, quantize

    side = LatentProjection(None, (32,))
    for widths, expected in (((32,), True), ((16, 16), False)):
        packed = quantize(torch.randn(1, 2, 32), Quantization(4, widths))
        assert compiled.travels(packed, packed, side, side, None) is expected
    assert not compiled.travels(packed.codes, packed.codes, side, side, lambda states: states)


def tensors_alive():
    """Every tensor with numbers of its own on the device, by where they are."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.numel()]
    found = [each for each in found if each.device.type == DEVICE]
    return {each.untyped_storage().data_ptr(): each for each in found}


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 4])
def test_what_outlives_a_compiled_step_is_made_apart(bits, monkeypatch):
    # In CUDA graphs all else that a step allocates is the graph's.
    for module in (op, rotary):
        monkeypatch.setattr(module, "uses_kernels", lambda tensor: True)
    kept = []
    users = [
        module for name, module in sys.modules.items() if name.startswith("palu.") and hasattr(module, "made_apart")
    ]
    for module in users:
        monkeypatch.setattr(
            module, "made_apart", lambda device, make: kept.append(made_apart(device, make)) or kept[-1]
        )
    for cached in (layout.side_of, factors._columns, launch._chunks):
        cached.cache_clear()
    model = tiny_model("llama", head_dim=64, hidden_size=256, num_hidden_layers=1).to(DEVICE)
    latent = compressed(model, 0.75, rank_multiple=16).model
    palu.set_quantization(latent, palu.QuantizationConfig(bits, bits))
    ids = random_windows(latent, 1, PROMPT + 1).to(DEVICE)
    cache = LatentCache(latent.config, capacity=PROMPT + 4)
    latent(ids[:, :PROMPT], past_key_values=cache)
    before = tensors_alive()
    torch._dynamo.reset()
    step = torch.compile(latent, fullgraph=True, backend="aot_eager")
    step(ids[:, PROMPT:], past_key_values=cache, position_ids=torch.tensor([[PROMPT]], device=DEVICE))
    left = set(tensors_alive()) - set(before)
    known = {each.untyped_storage().data_ptr() for made in kept for each in tree_leaves(made) if torch.is_tensor(each)}
    assert known
    assert left <= known, [tuple(tensors_alive()[each].shape) for each in left - known]
