"""`adapt`: output projections take a step towards the calibration text, as far as predictions hardly change."""

import pytest
import torch
from torch.nn import functional as F

import palu
from palu.calibrate.adapt import RIDGE, _Trial, adapt_outputs
from tests.helpers import FAMILIES, compressed, random_windows, tiny_model


def windows_of(model, count=16):
    """Windows that can be learnt: every token is followed by the next one."""
    starts = random_windows(model, count)[:, :1]
    return (starts + torch.arange(24)) % model.config.vocab_size


@torch.no_grad()
def loss_and_divergence(model, original, windows):
    logits = (each(windows, use_cache=False).logits[:, :-1].float() for each in (model, original))
    found, expected = (each.log_softmax(-1) for each in logits)
    loss = F.nll_loss(found.flatten(0, 1), windows[:, 1:].flatten())
    return loss.item(), (expected.exp() * (expected - found)).sum(-1).mean().item()


def adapted(model, windows, share, **settings):
    methods = {"decompose_method": "whiten", "fuse_values": False}
    return compressed(model, 0.4, windows, adapt=share, **(methods | settings)).model


def outputs(model):
    return [layer.self_attn.o_proj.weight.detach().double() for layer in model.model.layers]


def tried(windows):
    return windows[torch.arange(len(windows)) % 4 == 1]


def directions(model, windows):
    """The step's direction of every layer, from gradients of all tokens at once, in float64."""
    model = model.double()
    seen = [{} for _ in model.model.layers]

    def watch(layer):
        def hook(module, args, output):
            output.retain_grad()
            seen[layer].update(given=args[0], made=output)

        return hook

    handles = [each.self_attn.o_proj.register_forward_hook(watch(i)) for i, each in enumerate(model.model.layers)]
    logits = model(windows, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    found = []
    for each in seen:
        given, gradient = each["given"].detach().flatten(0, 1), each["made"].grad.flatten(0, 1)
        gram = given.T @ given / len(given)
        damped = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        slope = gradient.T @ given / len(given)
        found.append(-slope @ torch.linalg.inv(damped) / gradient.square().sum(1).mean())
    return found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_layers_take_the_same_multiple_of_their_natural_gradient(family):
    model = tiny_model(family)
    windows = windows_of(model)
    found = compressed(model, 0.4).model
    before = outputs(found)
    adapt_outputs(found, model, windows, 0.5)
    changes = [after - first for after, first in zip(outputs(found), before, strict=True)]
    untouched = windows[torch.arange(len(windows)) % 4 != 1]
    expected = directions(compressed(model, 0.4).model, untouched)
    step = changes[0].norm() / expected[0].norm()
    assert step > 0
    for change, direction in zip(changes, expected, strict=True):
        assert (change - step * direction).norm() < 1e-3 * change.norm()


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_step_is_the_largest_that_the_share_allows_and_lowers_the_loss(share, dtype):
    model = tiny_model("llama").to(dtype)
    windows = windows_of(model)
    found = compressed(model, 0.8).model
    before, first = outputs(found), loss_and_divergence(found, model, tried(windows))
    done = adapt_outputs(found, model, windows, share)
    loss, divergence = loss_and_divergence(found, model, tried(windows))
    assert (done.loss, done.divergence) == pytest.approx(first, rel=1e-3)
    assert (done.adapted_loss, done.adapted_divergence) == pytest.approx((loss, divergence), rel=1e-3)
    assert 0 < done.step < 0.5
    assert loss < first[0]
    assert divergence <= (1 + share) * first[1] * (1 + 1e-3)
    moved = [(own - weight).norm() / weight.norm() for own, weight in zip(outputs(found), before, strict=True)]
    assert max(moved).item() == pytest.approx(done.step, rel=1e-3 if dtype == torch.float32 else 0.3)
    if dtype == torch.float32:
        for layer, own, weight in zip(found.model.layers, outputs(found), before, strict=True):
            layer.self_attn.o_proj.weight.data = (weight + 2 * (own - weight)).float()
        twice = loss_and_divergence(found, model, tried(windows))
        assert twice[0] >= first[0] or twice[1] > (1 + share) * first[1]


def test_nothing_moves_where_nothing_was_lost():
    model = tiny_model("llama")
    windows = windows_of(model)
    found = compressed(model, 1.0, sequential=False).model
    assert adapt_outputs(found, model, windows, 0.1).step == 0
    for own, first in zip(outputs(found), outputs(model), strict=True):
        assert torch.equal(own, first)


def test_the_original_and_what_it_shares_are_left_alone():
    model = tiny_model("llama")
    windows, before = windows_of(model), {name: each.clone() for name, each in model.state_dict().items()}
    found = adapted(model, windows, 0.5)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert found.config.palu["compression"]["adapt"] == 0.5
    assert not torch.equal(outputs(found)[0], outputs(adapted(model, windows, 0.0))[0])


def test_adapting_goes_on_from_what_was_refitted():
    model = tiny_model("llama")
    windows = windows_of(model)
    found = adapted(model, windows, 0.0)
    adapt_outputs(found, model, windows, 0.5)
    for own, other in zip(outputs(adapted(model, windows, 0.5)), outputs(found), strict=True):
        assert (own - other).norm() < 1e-4 * own.norm()


def test_weights_are_as_before_where_a_trial_fails(monkeypatch):
    model = tiny_model("llama")
    found = compressed(model, 0.4).model
    before, measure, calls = [layer.self_attn.o_proj.weight for layer in found.model.layers], _Trial.measure, []

    def fail_the_second_time(trial):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(trial)

    monkeypatch.setattr(_Trial, "measure", fail_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        adapt_outputs(found, model, windows_of(model), 0.5)
    for layer, weight in zip(found.model.layers, before, strict=True):
        assert layer.self_attn.o_proj.weight is weight
    assert not any(layer.self_attn.o_proj._forward_hooks for layer in found.model.layers)


def test_gradients_that_are_not_finite_name_their_layer():
    model = tiny_model("llama")
    found = compressed(model, 0.4, sequential=False).model
    down = found.model.layers[2].mlp.down_proj
    down.weight = torch.nn.Parameter(torch.full_like(down.weight, float("nan")))
    with pytest.raises(palu.PaluError, match="NaN or infinity in the gradients of layer 0"):
        adapt_outputs(found, model, windows_of(model), 0.5)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "much", None, True])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(palu.PaluError, match="must be a share from 0, which does nothing, to 1"):
        palu.CompressionConfig(adapt=share)


def test_a_single_window_is_refused():
    model = tiny_model("llama")
    with pytest.raises(palu.PaluError, match="adapt needs two or more calibration windows"):
        adapted(model, windows_of(model, 1), 0.1, sequential=False)
    with pytest.raises(palu.PaluError, match="adapt needs n_whiten_calib_samples of two or more"):
        palu.CompressionConfig(adapt=0.1, sequential=False, n_whiten_calib_samples=1)
