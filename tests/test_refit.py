"""`sequential`: output projections are fitted to what compressed attention hands them."""

import pytest
import torch

import palu
from palu.calibrate.refit import RIDGES
from palu.calibrate.windows import CalibrationWindows
from tests.helpers import FAMILIES, compressed, random_windows, tiny_model


@torch.no_grad()
def seen_by_output(model, windows, layer):
    """What o_proj of a layer is given and puts out, float64 [tokens, features]."""
    seen = {}
    output = model.model.layers[layer].self_attn.o_proj
    handle = output.register_forward_hook(lambda module, args, found: seen.update(given=args[0], made=found))
    model(windows, use_cache=False)
    handle.remove()
    return tuple(seen[name].flatten(0, 1).double() for name in ("given", "made"))


def sequential(model, windows, **settings):
    return compressed(model, 0.4, windows, **({"decompose_method": "whiten", "sequential": True} | settings)).model


def ridge_regression(given, wanted, weight, stay):
    """W of the least |wanted - W given|^2 + stay |W - weight|^2, as one least-squares problem."""
    size = given.shape[1]
    rows = torch.cat([given, stay**0.5 * torch.eye(size, dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([wanted, stay**0.5 * weight.T])).solution.T


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("layer", [0, 2])
def test_every_output_projection_solves_its_ridge_regression_on_the_compressed_stream(family, layer):
    model = tiny_model(family)
    windows = random_windows(model, 64)
    fitted = sequential(model, windows, fuse_values=False)
    given, _ = seen_by_output(fitted, windows, layer)
    _, wanted = seen_by_output(model, windows, layer)
    before, after = (each.model.layers[layer].self_attn.o_proj for each in (model, fitted))
    if before.bias is not None:
        wanted = wanted - before.bias.double()
    weight = before.weight.double()
    odd = (torch.arange(64) % 2 == 1).repeat_interleave(windows.shape[1])
    missed = []
    for ridge in RIDGES:
        missed.append(0.0)
        for half in (odd, ~odd):
            stay = ridge * given[half].square().sum(0).mean()
            found = ridge_regression(given[half], wanted[half], weight, stay)
            missed[-1] += (wanted[~half] - given[~half] @ found.T).square().sum().item()
    assert min(missed) < (wanted - given @ weight.T).square().sum()
    stay = RIDGES[missed.index(min(missed))] / 2 * given.square().sum(0).mean()
    expected = ridge_regression(given, wanted, weight, stay)
    assert (after.weight - expected).norm() < 1e-3 * (expected - weight).norm()


def test_a_layer_whose_tokens_foretell_nothing_of_others_is_left_as_it_is():
    model = tiny_model("llama")
    windows = random_windows(model, 2, 4)
    fitted = sequential(model, windows, fuse_values=False)
    kept = [
        torch.equal(fitted.model.layers[i].self_attn.o_proj.weight, layer.self_attn.o_proj.weight)
        for i, layer in enumerate(model.model.layers)
    ]
    assert any(kept)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_at_full_rank_refitting_changes_nothing(family):
    model = tiny_model(family)
    fitted, windows = compressed(model, sequential=True).model, random_windows(model, seed=1)
    with torch.no_grad():
        assert torch.allclose(fitted(windows).logits, model(windows).logits, atol=1e-4)


@pytest.mark.parametrize("fuse_values", [False, True])
def test_refitting_brings_predictions_nearer_and_leaves_the_original_alone(fuse_values):
    model = tiny_model("llama")
    windows = random_windows(model, 64)
    given = CalibrationWindows(windows, windows)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings = {"search_method": "uniform", "rank_multiple": 4, "fuse_values": fuse_values}
    plain = palu.CompressionConfig(0.4, 2, decompose_method="whiten", sequential=False, **settings)
    plain = palu.compress(model, config=plain, windows=given).model
    fitted = sequential(model, windows, fuse_values=fuse_values)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    # Folding into o_proj comes after.
    assert all(layer.fused_values == fuse_values for layer in fitted.config.latent.layers)
    with torch.no_grad():
        expected = model(windows).logits.log_softmax(-1)
        lost = [
            torch.nn.functional.kl_div(each(windows).logits.log_softmax(-1), expected, log_target=True, reduction="sum")
            for each in (plain, fitted)
        ]
    assert lost[1] < 0.9 * lost[0]


def test_methods_without_calibration_ask_for_windows_to_refit_on():
    model = tiny_model("llama")
    methods = {"search_method": "uniform", "decompose_method": "svd", "rank_multiple": 4}
    config = palu.CompressionConfig(0.5, 2, sequential=True, calib_seqlen=48, **methods)
    with pytest.raises(palu.PaluError, match="tokenizer"):
        palu.compress(model, config=config)
    windows = random_windows(model)
    with pytest.raises(palu.PaluError, match="no calibration windows for the moments"):
        palu.compress(model, config=config, windows=CalibrationWindows(None, windows))


def test_one_window_is_not_enough():
    model = tiny_model("llama")
    with pytest.raises(palu.PaluError, match="sequential needs two or more calibration windows"):
        sequential(model, random_windows(model, 1))


def test_activations_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.weight.data *= 1e38
    with pytest.raises(palu.PaluError, match="activations of layer 1"):
        compressed(model, 0.5, sequential=True)


def test_a_single_window_is_refused_when_it_is_asked_for():
    with pytest.raises(palu.PaluError, match="sequential needs n_whiten_calib_samples of two or more"):
        palu.CompressionConfig(sequential=True, n_whiten_calib_samples=1)
