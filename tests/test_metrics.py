"""What errors of keys and values cost, against what they do to scores and outputs."""

import pytest
import torch

from palu.calibrate.metrics import site_metric
from palu.calibrate.moments import stream_moments
from palu.config import head_dim
from palu.core.types import Site, SiteShape
from tests.helpers import FAMILIES, compressed, random_windows, tiny_model


def metric_of(model, side, group, heads, layer=1):
    moments = list(stream_moments(model, random_windows(model, 3, 40)))[layer]
    shape = SiteShape(Site(layer, side, group), heads * head_dim(model.config))
    return site_metric(model, shape, moments), moments


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_key_error_costs_what_it_does_to_scores_on_average_over_angles(family):
    model = tiny_model(family)
    size, heads = head_dim(model.config), 2
    metric, _ = metric_of(model, "key", 1, heads)
    attention, found = model.model.layers[1].self_attn, []
    handle = attention.q_proj.register_forward_hook(lambda m, args, output: found.append(output.detach()))
    windows = random_windows(model, 3, 40)
    with torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    queries = torch.cat(found).reshape(windows.numel(), model.config.num_key_value_heads, -1, size).double()
    error = torch.randn(heads, size).double()
    # Every pair of numbers is turned by every angle of a grid, on which cosines average out exactly.
    angles = torch.arange(8).double() * (torch.pi / 4)
    first, second = error.split(size // 2, dim=1)
    change = 0.0
    for head in range(heads):
        own = queries[:, heads + head]
        for pair in range(size // 2):
            turned = torch.stack(
                [
                    first[head, pair] * angles.cos() - second[head, pair] * angles.sin(),
                    first[head, pair] * angles.sin() + second[head, pair] * angles.cos(),
                ]
            )
            scores = own[..., [pair, pair + size // 2]] @ turned
            change += scores.square().mean(-1).sum(-1).mean().item()
    flat = error.flatten()
    assert (flat @ metric @ flat).item() == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_value_error_costs_what_it_does_to_outputs(family):
    model = tiny_model(family)
    size, heads = head_dim(model.config), 2
    metric, _ = metric_of(model, "value", 1, heads)
    weight = model.model.layers[1].self_attn.o_proj.weight.detach().double()
    queries = model.config.num_attention_heads // model.config.num_key_value_heads
    error, cost = torch.randn(heads, size).double(), 0.0
    for head in range(heads):
        for query in range(queries):
            at = ((heads + head) * queries + query) * size
            cost += (weight[:, at : at + size] @ error[head]).square().sum().item()
    flat = error.flatten()
    assert (flat @ metric @ flat).item() == pytest.approx(cost, rel=1e-6)


@pytest.mark.parametrize("method", ["query", "output", "attention"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_full_rank_reproduces_the_models_logits(family, method):
    model = tiny_model(family)
    latent = compressed(model, 1.0, decompose_method=method, search_method="uniform").model
    ids = random_windows(model, 2, 30)
    with torch.no_grad():
        assert torch.allclose(latent(ids).logits, model(ids).logits, atol=1e-4)


def test_normalised_keys_are_factored_alike_however_large_they_are():
    """A norm takes a head's size away, so a larger head's errors may not count more."""
    model, larger = tiny_model("qwen3"), tiny_model("qwen3")
    larger.load_state_dict(model.state_dict())
    size = head_dim(model.config)
    with torch.no_grad():
        for layer in larger.model.layers:
            layer.self_attn.k_proj.weight[:size] *= 64
    ids = random_windows(model, 2, 30)
    with torch.no_grad():
        # Where what is added to the mean square is next to nothing.
        assert torch.allclose(larger(ids).logits, model(ids).logits, atol=1e-3)
        outputs = [
            compressed(each, 0.5, decompose_method="query", search_method="uniform").model(ids).logits
            for each in (model, larger)
        ]
    assert torch.allclose(*outputs, atol=2e-3)
