"""`regroup`: kv heads whose keys lose least together share a latent."""

import itertools
from functools import partial

import pytest
import torch

import palu
from palu.calibrate.evidence import Calibration
from palu.calibrate.regroup import in_order
from palu.calibrate.windows import CalibrationWindows
from palu.core.progress import silent
from palu.pipeline import rank_budget
from palu.search import get_search
from tests.helpers import FAMILIES, compressed, left_padded_batch, random_windows, tiny_model


def orders_of(model, size, ratio=0.5, method="whiten", **settings):
    """The head order of every layer."""
    config = palu.CompressionConfig(ratio, size, decompose_method=method, regroup=True, rank_multiple=4, **settings)
    windows = random_windows(model, 8)
    calibration = Calibration(model, config, CalibrationWindows(windows, windows), None, silent)
    group = next(shape for shape in calibration.shapes if shape.site.side == "key")
    lost = partial(get_search(config.search_method).energy_lost, group=group, budget=rank_budget(config))
    return list(calibration.head_orders(lost))


def with_kin(model, groups):
    """Keys of the heads of a group are mixtures of as many numbers as one head has, and a little of their own."""
    size = model.config.head_dim
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight.data
        heads = weight.view(-1, size, weight.shape[1])
        for group in groups:
            common = torch.randn(size, weight.shape[1]) * 0.15
            for head in group:
                heads[head] = torch.linalg.qr(torch.randn(size, size)).Q @ common + 0.02 * heads[head]
    return model


def grouped(order, size):
    return {frozenset(order[first : first + size]) for first in range(0, len(order), size)}


@pytest.mark.parametrize("method", ["svd", "whiten", "attention", "fisher"])
@pytest.mark.parametrize(
    ("heads", "groups"),
    [
        (4, [(0, 2), (1, 3)]),
        (8, [(0, 3, 5, 6), (1, 2, 4, 7)]),
        (16, [(0, 5, 9, 15), (1, 4, 8, 14), (2, 3, 7, 13), (6, 10, 11, 12)]),
    ],
)
def test_heads_that_are_kin_are_found(method, heads, groups):
    model = with_kin(tiny_model("llama", num_key_value_heads=heads, num_attention_heads=heads, hidden_size=256), groups)
    size = len(groups[0])
    for order in orders_of(model, size, 1 / size, method):
        assert sorted(order) == list(range(heads))
        assert grouped(order, size) == {frozenset(group) for group in groups}


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9])
def test_kin_are_found_where_the_ratio_is_of_bytes(ratio):
    groups = [(0, 2), (1, 3)]
    model = with_kin(tiny_model("llama"), groups)
    for order in orders_of(model, 2, ratio, search_method="global_bits", lt_hadamard=True):
        assert grouped(order, 2) == {frozenset(group) for group in groups}


@pytest.mark.parametrize("search", ["global", "global_bits"])
def test_kin_are_found_where_only_keys_are_bounded(search):
    groups = [(0, 2), (1, 3)]
    model = with_kin(tiny_model("llama"), groups)
    settings = {"search_method": search, "lt_hadamard": True, "max_key_rank": 16}
    for order in orders_of(model, 2, 1.0, **settings):
        assert grouped(order, 2) == {frozenset(group) for group in groups}


def test_no_other_way_to_share_a_few_heads_out_loses_less():
    model = tiny_model("llama")
    windows = random_windows(model, 8)
    given = CalibrationWindows(windows, windows)
    config = palu.CompressionConfig(0.5, 2, regroup=True, rank_multiple=4)

    def lost(permutation):
        """Of keys behind half of every group's ranks, layer by layer."""
        calibration = Calibration(in_order(model, [permutation] * 3), config, given, None, silent)
        factors = calibration.factors({})
        return [
            sum(
                each.energy[16:].sum().item() for site, each in factors.items() if (site.layer, site.side) == (n, "key")
            )
            for n in range(3)
        ]

    every = [lost((0, *rest)) for rest in itertools.permutations((1, 2, 3))]
    chosen = [lost(order)[layer] for layer, order in enumerate(orders_of(model, 2))]
    assert chosen == pytest.approx([min(each[layer] for each in every) for layer in range(3)], rel=1e-4)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_heads_in_another_order_are_the_same_model(family):
    model = tiny_model(family)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    ordered = in_order(model, [(2, 0, 3, 1), (3, 2, 1, 0), (0, 1, 2, 3)])
    batch = left_padded_batch(model)
    with torch.no_grad():
        expected, found = (each(**batch).logits for each in (model, ordered))
    seen = batch["attention_mask"].bool()
    assert torch.allclose(expected[seen], found[seen], atol=1e-4)
    assert not torch.equal(
        ordered.model.layers[0].self_attn.k_proj.weight, weights["model.layers.0.self_attn.k_proj.weight"]
    )
    assert ordered.model.embed_tokens.weight is model.model.embed_tokens.weight or torch.equal(
        ordered.model.embed_tokens.weight, model.model.embed_tokens.weight
    )
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_at_full_rank_a_model_in_another_order_is_the_same_too(family):
    model, orders = tiny_model(family), [(2, 0, 3, 1), (3, 2, 1, 0), (0, 1, 2, 3)]
    found = compressed(in_order(model, orders), sequential=True).model
    windows = random_windows(model, seed=1)
    with torch.no_grad():
        assert torch.allclose(found(windows).logits, model(windows).logits, atol=1e-4)


def test_kin_that_were_apart_lose_less_together():
    model = with_kin(tiny_model("llama"), [(0, 2), (1, 3)])
    windows = random_windows(model)
    with torch.no_grad():
        expected = model(windows).logits.log_softmax(-1)
        apart, together = (
            compressed(model, 0.5, value_group_size="all", decompose_method="whiten", regroup=regroup)
            .model(windows)
            .logits.log_softmax(-1)
            for regroup in (False, True)
        )
    lost = [
        torch.nn.functional.kl_div(each, expected, log_target=True, reduction="sum").item()
        for each in (apart, together)
    ]
    assert lost[1] < lost[0]


def test_where_everything_is_kept_there_is_nothing_to_regroup_for():
    with pytest.raises(palu.PaluError, match="regroup does nothing at param_ratio_target 1"):
        palu.CompressionConfig(1.0, regroup=True)


@pytest.mark.parametrize("size", [1, 4, "all"])
def test_groups_that_leave_no_choice_are_refused(size):
    with pytest.raises(palu.PaluError, match="regroup does nothing in groups of one or of all 4 kv heads"):
        compressed(tiny_model("llama"), 0.5, head_group_size=size, regroup=True)
