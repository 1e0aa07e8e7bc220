"""Under torch.compile a decoding step is one graph, goes through the kernels, and is right step after step."""

import pytest
import torch

import palu
from palu import LatentCache
from palu.kernels.apart import made_apart
from palu.kernels.decode_attention import compiled, launch, op
from palu.kernels.decode_attention.reference import decode_attention as reference
from palu.nn import rotary
from tests.helpers import compressed, random_windows, tiny_model

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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = tiny_model(family, head_dim=64, hidden_size=256, num_hidden_layers=2).to(device)
    latent = compressed(base, 0.75, rank_multiple=16).model
    palu.set_quantization(latent, palu.QuantizationConfig(bits, bits))
    ids = random_windows(latent, 2, PROMPT + STEPS).to(device)
    cache, other = (LatentCache(latent.config, capacity=PROMPT + STEPS + 4) for _ in range(2))
    for each in (cache, other):
        latent(ids[:, :PROMPT], past_key_values=each)

    def step(token, position, cache=cache):
        return latent(token, past_key_values=cache, position_ids=position).logits

    torch._dynamo.reset()
    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    for index in range(STEPS):
        at = PROMPT + index
        position = torch.full((2, 1), at, device=device)
        launches.clear()
        logits = compiled_step(ids[:, at : at + 1], position)
        assert len(launches) == latent.config.num_hidden_layers
        assert torch.allclose(logits, step(ids[:, at : at + 1], position, other), atol=1e-4)
        if bits == 16:
            assert torch.allclose(logits[:, 0], latent(ids[:, : at + 1]).logits[:, -1], atol=1e-4)
    assert not compiled._tables


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
