"""What errors of keys and values do to predictions: Fisher information of outputs, probes of projections."""

import pytest
import torch
from torch.nn import functional as F

import palu
from palu.calibrate.damage import FRACTIONS, probe_damage
from palu.calibrate.evidence import Calibration
from palu.calibrate.fisher import output_fisher
from palu.calibrate.sites import projection, site_shapes, site_weight
from palu.calibrate.windows import CalibrationWindows
from palu.core.errors import PaluError
from palu.core.progress import silent
from palu.core.types import Factors, SiteStats
from palu.decompose import get_decomposition
from tests.helpers import FAMILIES, random_windows, tiny_model


@torch.no_grad()
def divergence(model, windows, module, replace):
    """Nats per token that the predictions change by where `replace` makes a module's output."""
    expected = F.log_softmax(model(windows).logits.double(), dim=-1)
    handle = module.register_forward_hook(replace)
    found = F.log_softmax(model(windows).logits.double(), dim=-1)
    handle.remove()
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("side", ["key", "value"])
def test_small_errors_of_outputs_change_predictions_as_their_fisher_information_says(family, side):
    model = tiny_model(family)
    with torch.no_grad():
        # Predictions that are sure of themselves: the text's own tokens are not what they would draw.
        model.lm_head.weight *= 4
    windows = random_windows(model, 48, 32)
    fisher = output_fisher(model, windows, {"key": 2, "value": 4}, seed=0)[1, side]
    groups, size = fisher.shape[:2]
    group = int(torch.randint(groups, ()))
    direction = torch.randn(size, size) @ torch.diag(torch.logspace(0, -2, size))
    scale, found = 2e-3 / direction.square().sum().sqrt(), []
    for _ in range(4):
        noise = torch.randn(*windows.shape, size) @ direction.T * scale

        def add(module, args, output, noise=noise):
            return output + F.pad(noise, (group * size, (groups - group - 1) * size))

        found.append(divergence(model, windows, projection(model, 1, side), add))
    expected = (fisher[group] * (direction @ direction.T)).sum().item() * scale.item() ** 2 / 2
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.25)


def test_output_fisher_leaves_the_model_as_it_was_and_follows_its_seed():
    model = tiny_model("llama")
    windows = random_windows(model, 3, 20)
    one, same, other = (output_fisher(model, windows, {"key": 1, "value": 2}, seed)[2, "value"] for seed in (5, 5, 6))
    assert one.shape == (2, 32, 32)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_probes_measure_what_a_truncated_projection_does(family):
    model = tiny_model(family)
    windows = random_windows(model, 3, 24)
    config = palu.CompressionConfig(0.5, 2)
    factors = {
        shape.site: get_decomposition("svd")(site_weight(model, shape).float(), SiteStats())
        for shape in site_shapes(model.config, config)
    }
    damage = probe_damage(model, factors, windows)
    assert set(damage) == {(layer, side) for layer in range(3) for side in ("key", "value")}
    for (layer, side), points in damage.items():
        assert points == sorted(points)
        assert points[0] == (0.0, 0.0)
        parts = [factors[site] for site in sorted(factors) if (site.layer, site.side) == (layer, side)]
        for fraction, (energy, nats) in zip(FRACTIONS, points, strict=True):
            kept = [part.truncate(max(1, round(fraction * len(part.energy)))) for part in parts]
            weight = torch.cat([part.up @ part.down for part in kept]).float()

            def replace(module, args, output, weight=weight):
                return F.linear(args[0], weight, module.bias)

            expected = divergence(model, windows, projection(model, layer, side), replace)
            assert nats == pytest.approx(expected, rel=1e-3, abs=1e-6)
            lost = (projection(model, layer, side).weight - weight).square().sum().item()
            assert energy == pytest.approx(lost, rel=1e-3)


def test_what_rounding_changes_is_no_damage():
    model = tiny_model("llama").bfloat16()
    windows = random_windows(model, 2, 24)
    shapes = site_shapes(model.config, palu.CompressionConfig(0.5, 2))
    exact = [get_decomposition("svd")(site_weight(model, shape).float(), SiteStats()) for shape in shapes]
    factors = {
        shape.site: Factors(each.down.bfloat16(), each.up.bfloat16(), each.energy)
        for shape, each in zip(shapes, exact, strict=True)
    }
    for points in probe_damage(model, factors, windows).values():
        nats = [found for _, found in points]
        assert nats[0] == 0
        assert nats == sorted(nats)
        assert nats[-1] > 0


def test_probes_that_are_not_finite_name_the_layer():
    model = tiny_model("llama")
    shapes = site_shapes(model.config, palu.CompressionConfig(0.5, 2))
    factors = {shape.site: get_decomposition("svd")(site_weight(model, shape), SiteStats()) for shape in shapes}
    site = next(shape.site for shape in shapes if (shape.site.layer, shape.site.side) == (2, "value"))
    factors[site] = factors[site]._replace(up=factors[site].up * float("inf"))
    with pytest.raises(PaluError, match="layer 2: predictions with a truncated value projection are not finite"):
        probe_damage(model, factors, random_windows(model, 1, 16))


def test_a_group_that_predictions_hang_on_more_gets_more_ranks():
    model = tiny_model("llama")
    size = model.config.num_attention_heads // 2 * 16
    with torch.no_grad():
        for layer in model.model.layers:
            # Query heads of the second half of the kv heads hardly reach the output.
            layer.self_attn.o_proj.weight[:, size:] *= 0.05
    windows = CalibrationWindows(random_windows(model, 6), random_windows(model, 6))
    config = palu.CompressionConfig(0.5, 2, search_method="global", decompose_method="fisher", rank_multiple=2)
    plan = palu.compress(model, config=config, windows=windows).plan
    for layer in range(3):
        first, second = plan.group_ranks(layer, "value")
        assert first > second


def test_probes_read_as_many_windows_as_asked():
    model = tiny_model("llama")
    windows = CalibrationWindows(random_windows(model, 4, 20), None)
    for count in (1, 3):
        config = palu.CompressionConfig(0.5, 2, search_method="global", n_probe_calib_samples=count)
        calibration = Calibration(model, config, windows, None, silent)
        factors = calibration.factors({})
        assert calibration.damage(factors) == probe_damage(model, factors, windows.moments[:count])


@pytest.mark.parametrize("method", ["svd", "whiten", "fisher"])
def test_a_global_plan_spends_its_budget_with_any_factors(method):
    model = tiny_model("llama")
    windows = CalibrationWindows(random_windows(model), random_windows(model, 2, 40))
    config = palu.CompressionConfig(0.5, 2, search_method="global", decompose_method=method, rank_multiple=4)
    compression = palu.compress(model, config=config, windows=windows)
    assert compression.kept_ratio == 0.5
    assert len(set(compression.plan.ranks.values())) > 1
    assert "damage of every projection" in [stage["stage"] for stage in compression.stages]


def test_what_keys_cost_is_refused_where_nothing_weighs_it():
    with pytest.raises(PaluError, match=r"key_cost 2\.0 is for the search_method global"):
        palu.CompressionConfig(key_cost=2.0, search_method="uniform")
    with pytest.raises(PaluError, match="key_cost 0 must be a positive number"):
        palu.CompressionConfig(key_cost=0, search_method="global")
