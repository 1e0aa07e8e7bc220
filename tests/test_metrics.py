"""What errors of keys and values cost, against what they do to scores and outputs."""

import itertools

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import palu
from palu.calibrate.evidence import Calibration
from palu.calibrate.metrics import site_metric
from palu.calibrate.moments import stream_moments
from palu.calibrate.sites import site_weight
from palu.calibrate.windows import CalibrationWindows
from palu.config import head_dim
from palu.core.progress import silent
from palu.core.types import SIDES, Site, SiteShape, SiteStats
from palu.decompose import get_decomposition
from tests.helpers import FAMILIES, compressed, random_windows, tiny_model

DISTANCES = 24


def metric_of(model, side, group, heads, layer=1):
    moments = list(stream_moments(model, random_windows(model, 3, 40)))[layer]
    shape = SiteShape(Site(layer, side, group), heads * head_dim(model.config))
    return site_metric(model, shape, moments, DISTANCES)


def recorded(model, register):
    """What goes through a module's hook over the calibration windows: [tokens, kv heads, heads of each, head_dim]."""
    found, windows = [], random_windows(model, 3, 40)
    handle = register(lambda module, args, *output: found.append((output or args)[0].detach()))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    shape = (windows.numel(), model.config.num_key_value_heads, -1, head_dim(model.config))
    return torch.cat(found).reshape(shape).double()


def queries_of(model, layer=1):
    """Before they are rotated; normalised ones where the family normalises queries (Qwen3)."""
    attention = model.model.layers[layer].self_attn
    return recorded(model, getattr(attention, "q_norm", attention.q_proj).register_forward_hook)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_streamed_query_grams_are_those_of_the_queries_that_meet_keys(family):
    model = tiny_model(family)
    got = [moments.query_gram.double() for moments in stream_moments(model, random_windows(model, 3, 40))]
    assert len(got) == len(model.model.layers)
    for layer, gram in enumerate(got):
        queries = queries_of(model, layer)
        expected = torch.einsum("tkqd,tkqe->kde", queries, queries) / len(queries)
        assert torch.allclose(gram, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_key_error_costs_what_it_does_to_scores_over_all_distances(family):
    model = tiny_model(family)
    size, heads = head_dim(model.config), 2
    error, change, pairs = torch.randn(heads, size).double(), 0.0, 0
    seen = error
    norm = getattr(model.model.layers[1].self_attn, "k_norm", None)
    if norm is not None:
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2)
        keys = recorded(model, norm.register_forward_pre_hook)[:, 2:4, 0]
        mean_square = keys.square().mean((0, 2)) + norm.variance_epsilon
        seen = error * norm.weight.detach().double() / mean_square.sqrt()[:, None]
    metric, queries = metric_of(model, "key", 1, heads), queries_of(model)[:, 2:4]
    rotary = model.model.rotary_emb
    for distance in range(DISTANCES):
        cos, sin = rotary(torch.zeros(1), torch.tensor([[distance]]))
        turned, _ = apply_rotary_pos_emb(
            queries.flatten(1, 2)[None], queries[None, :, :, 0], cos.double(), sin.double()
        )
        scores = torch.einsum("tkqd,kd->tkq", turned[0].view(queries.shape), seen)
        change += (DISTANCES - distance) * scores.square().sum((1, 2)).mean().item()
        pairs += DISTANCES - distance
    flat = error.flatten()
    assert (flat @ metric @ flat).item() == pytest.approx(change / pairs, rel=1e-3)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_value_error_costs_what_it_does_to_outputs(family):
    model = tiny_model(family)
    size, heads = head_dim(model.config), 2
    metric = metric_of(model, "value", 1, heads)
    weight = model.model.layers[1].self_attn.o_proj.weight.detach().double()
    queries = model.config.num_attention_heads // model.config.num_key_value_heads
    error, cost = torch.randn(heads, size).double(), 0.0
    for head in range(heads):
        for query in range(queries):
            at = ((heads + head) * queries + query) * size
            cost += (weight[:, at : at + size] @ error[head]).square().sum().item()
    flat = error.flatten()
    assert (flat @ metric @ flat).item() == pytest.approx(cost, rel=1e-6)


@pytest.mark.parametrize("method", ["query", "output", "attention", "fisher"])
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


@pytest.mark.parametrize(
    ("method", "weighed"),
    [("query", {"k"}), ("output", {"v"}), ("attention", {"k", "v"}), ("fisher", {"k", "v"})],
)
def test_a_method_weighs_the_sides_that_it_says(method, weighed):
    model = tiny_model("llama")
    plain, other = (
        compressed(model, 0.5, decompose_method=name, fuse_values=False).model.model.layers
        for name in ("whiten", method)
    )
    for side in ("k", "v"):
        one, two = (getattr(layers[1].self_attn, f"{side}_proj").down.weight for layers in (plain, other))
        assert torch.allclose(one.abs(), two.abs(), atol=1e-4) == (side not in weighed)


def test_fisher_factors_weigh_attention_and_gradients_alike():
    model = tiny_model("qwen3")
    windows = CalibrationWindows(random_windows(model), random_windows(model))
    calibration = Calibration(model, palu.CompressionConfig(0.5, 2, decompose_method="fisher"), windows, None, silent)
    gradients = calibration.output_fisher()
    factors = calibration.factors(gradients)
    for (layer, moments), side in itertools.product(enumerate(stream_moments(model, windows.moments)), SIDES):
        shapes = [shape for shape in calibration.shapes if (shape.site.layer, shape.site.side) == (layer, side)]
        attention = [site_metric(model, shape, moments, windows.moments.shape[1]) for shape in shapes]
        gradient = gradients[layer, side].double()
        # Both groups together count alike in both, each as much as it does.
        sizes = [sum(metric.diagonal().sum() for metric in metrics) for metrics in (attention, gradient)]
        for shape, one, other in zip(shapes, attention, gradient, strict=True):
            stats = SiteStats(moments.gram, one / sizes[0] + other / sizes[1])
            expected = get_decomposition("attention")(site_weight(model, shape), stats)
            kept, best = factors[shape.site].truncate(9), expected.truncate(9)
            assert torch.allclose((kept.up @ kept.down).double(), best.up @ best.down, atol=1e-4)
            scale = 2 * len(expected.energy) / 2
            assert torch.allclose(factors[shape.site].energy, expected.energy * scale, rtol=1e-6)


@pytest.mark.parametrize(("method", "search"), [("attention", "uniform"), ("fisher", "global")])
def test_statistics_read_from_disk_give_the_same_factors(tmp_path, method, search):
    model = tiny_model("qwen3")
    windows = CalibrationWindows(random_windows(model), random_windows(model))
    config = palu.CompressionConfig(0.5, 2, search_method=search, decompose_method=method, rank_multiple=4)
    first = palu.compress(model, config=config, windows=windows, cache_dir=tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = palu.compress(model, config=config, windows=windows, cache_dir=tmp_path)
    assert first.plan == again.plan
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    state = again.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.model.state_dict().items())


def test_statistics_of_other_requests_are_not_taken_from_one_cache(tmp_path):
    model = tiny_model("llama")
    tokens = random_windows(model, 5)
    for method, group_size, moments, fisher, seed in [
        ("fisher", 2, tokens[:4], tokens[:3], 0),
        ("fisher", 1, tokens[:4], tokens[:3], 0),
        ("whiten", 2, tokens[:4], tokens[:3], 0),
        ("fisher", 2, tokens, tokens[:3], 0),
        ("fisher", 2, tokens[:4], tokens[1:3], 0),
        ("fisher", 2, tokens[:4], tokens[:3], 1),
    ]:
        options = {"search_method": "global", "decompose_method": method, "n_probe_calib_samples": 2, "seed": seed}
        config = palu.CompressionConfig(0.5, group_size, rank_multiple=2, **options)
        windows = CalibrationWindows(moments, fisher)
        kept, fresh = (palu.compress(model, config=config, windows=windows, cache_dir=at) for at in (tmp_path, None))
        assert kept.plan == fresh.plan
        state = fresh.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in kept.model.state_dict().items())
