"""Token policies: which tokens they keep, and how many, against plain implementations."""

import math
from fractions import Fraction

import pytest
import torch

import palu
from palu.core.errors import PaluError
from palu.nn.latent_cache import LatentCache
from palu.nn.sparse_layer import SparseLatentLayer
from palu.sparse.keep import Tokens, Windows
from palu.sparse.registry import get_policy
from palu.token_sparsity import TokenSparsity
from tests.helpers import compressed, left_padded_batch, random_windows, tiny_model
from tests.sparse_models import METHODS, compressed_with, positions_of, sparse


def plain_snapkv(query, key, capacity, window, kernel, sinks):
    """Kept tokens of one head group from rotated float64 queries and keys [heads, length, head_dim], step by step."""
    heads, length, head_dim = query.shape
    votes = [0.0] * length
    for head in range(heads):
        for position in range(length - window, length):
            scores = [float(query[head, position] @ key[head, t]) / math.sqrt(head_dim) for t in range(position + 1)]
            peak = max(scores)
            weights = [math.exp(score - peak) for score in scores]
            for t, weight in enumerate(weights):
                votes[t] += weight / sum(weights)
    votes[length - window :] = [0.0] * window
    around = kernel // 2
    pooled = [sum(votes[max(0, t - around) : t + around + 1]) for t in range(length)]
    chosen = sorted(range(sinks, length - window), key=lambda t: -pooled[t])[: capacity - window - sinks]
    return sorted([*range(sinks), *chosen, *range(length - window, length)])


def rotated(states, positions, inv_freq):
    angles = positions[:, None].double() * inv_freq.double()
    cos, sin = (torch.cat([table, table], dim=-1) for table in (angles.cos(), angles.sin()))
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_snapkv_keeps_what_a_plain_implementation_keeps(family, sinks):
    """The first layer alone, whose input is the same whatever the cache does; every head group keeps its own."""
    options = {"use_sliding_window": False} if family == "qwen2" else {}
    model = tiny_model(family, seed=int(torch.randint(1 << 30, ())), **options)
    latent = compressed_with(model, sparse("snapkv", capacity=15, kernel_size=3, sink_tokens=sinks), ratio=0.5).double()
    batch = left_padded_batch(latent, 40)
    output = latent(**batch, output_hidden_states=True)
    layer, cache = latent.model.layers[0], output.past_key_values
    attention, hidden = layer.self_attn, layer.input_layernorm(output.hidden_states[0])
    query, key = (
        projection(hidden).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj)
    )
    if attention.q_norm is not None:
        query, key = attention.q_norm(query), attention.k_norm(key)
    for row, padding in enumerate((0, 3, 7)):
        places = torch.arange(padding, 40)
        turned = [
            rotated(x[row, padding:].transpose(0, 1), places, latent.model.rotary_emb.inv_freq) for x in (query, key)
        ]
        keys = turned[1].repeat_interleave(2, dim=0)
        for group in range(2):
            heads = slice(group * 4, group * 4 + 4)
            kept = plain_snapkv(turned[0][heads], keys[heads], 15, 4, 3, sinks)
            assert positions_of(cache, 0, group)[row] == [padding + place for place in kept]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [16, 4, 3])
def test_half_the_tokens_take_half_the_bytes(method, bits):
    latent = compressed(tiny_model("llama"), 0.5, rank_multiple=8).model
    palu.set_quantization(latent, palu.QuantizationConfig(key_bits=bits, value_bits=bits))
    ids = random_windows(latent, 2, 200)
    per_token = latent.config.latent.bytes_per_token(4)
    palu.set_token_sparsity(latent, TokenSparsity(method, capacity_rate=0.5))
    cache = latent(ids).past_key_values
    groups = sum(layer.token_groups for layer in cache.layers)
    assert cache.nbytes() == pytest.approx(2 * 100 * (per_token + 4 * groups), rel=0.02)
    assert cache.allocated_nbytes() == cache.nbytes()
    assert cache.get_seq_length() == 200


@torch.no_grad()
def test_kept_codes_are_the_codes_that_were_there():
    latent = compressed(tiny_model("llama"), 0.5, rank_multiple=8).model
    palu.set_quantization(latent, palu.QuantizationConfig(key_bits=3, value_bits=4, group_size=4))
    ids = random_windows(latent, 2, 60)
    whole = LatentCache(latent.config)
    latent(ids, past_key_values=whole)
    palu.set_token_sparsity(latent, sparse("snapkv", capacity=20))
    cache = latent(ids).past_key_values
    layer, reference = cache.layers[0], whole.layers[0]
    for side, widths in zip(("key_buffer", "value_buffer"), layer.widths, strict=True):
        expected, held = (
            getattr(each, side).last(count).dequantized(torch.float32).split(widths, dim=-1)
            for each, count in ((reference, 60), (layer, 20))
        )
        for group, (whole_latents, kept) in enumerate(zip(expected, held, strict=True)):
            slots = layer.position_buffer.tokens[..., group, None].long().expand(-1, -1, kept.shape[2])
            assert torch.equal(kept, whole_latents.gather(1, slots))
    assert positions_of(cache, 0, 0) != positions_of(cache, 0, 1)


def test_budgets_of_the_pool_fall_as_its_formula_says():
    for layers, capacity, beta in ((1, 100, 4), (3, 100, 4), (32, 100, 4), (22, 440, 20)):
        policy = get_policy(sparse("pool", capacity=capacity, pyramid_beta=float(beta)))
        for layer in range(layers):
            exact = capacity * (1 + Fraction(layer, layers) * (Fraction(1, beta) - 1))
            assert policy.kept(layer, layers, 1000) == math.floor(exact)
            assert policy.kept(layer, layers, capacity) == capacity


@pytest.mark.parametrize("layers", [1, 2, 7, 32])
@pytest.mark.parametrize(("capacity", "length"), [(100, 1000), (100, 150), (101, 102), (333, 500)])
def test_budgets_of_the_pyramid_fall_and_add_up_to_the_capacity_of_every_layer(layers, capacity, length):
    policy = get_policy(TokenSparsity("pyramidkv", capacity=capacity, pyramid_beta=20.0))
    budgets = [policy.kept(layer, layers, length) for layer in range(layers)]
    assert sum(budgets) == layers * capacity
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] <= length
    if layers > 1 and length == 1000:
        assert budgets[-1] == 32 + (100 - 32) // 20


@torch.no_grad()
def test_layers_of_a_pyramid_hold_their_own_budgets():
    latent = compressed_with(tiny_model("llama"), sparse("pyramidkv", capacity=20, pyramid_beta=4.0))
    cache = latent(random_windows(latent, 2, 60)).past_key_values
    assert [layer.held for layer in cache.layers] == [32, 20, 8]


def plain_pooled(latents, positions, votes, sinks, newest, count, pool_type):
    """Windows of one row's tokens, one after the other."""
    between, left = len(latents) - sinks - newest, count - sinks - newest
    middle = [[] for _ in range(left)]
    for index in range(between):
        middle[index * left // between].append(sinks + index)
    windows = [[t] for t in range(sinks)] + middle + [[t] for t in range(len(latents) - newest, len(latents))]
    pooled, places = [], []
    for window in windows:
        best = max(window, key=lambda t: votes[t])
        rows = latents[window].double()
        total = sum(votes[t] for t in window)
        mean = (
            sum(votes[t] * positions[t] for t in window) / total
            if total
            else sum(positions[t] for t in window) / len(window)
        )
        pooled.append({"mean": rows.mean(0), "max": rows.amax(0), "best": latents[best].double()}[pool_type])
        places.append(positions[best] if pool_type == "best" else round(mean))
    return torch.stack(pooled), places


@pytest.mark.parametrize("pool_type", ["mean", "max", "best"])
def test_pooled_merging_equals_windows_taken_one_by_one(pool_type, monkeypatch):
    settings = TokenSparsity("pool", capacity=17, window_size=4, sink_tokens=3, pool_type=pool_type)
    layer = SparseLatentLayer(get_policy(settings), 0, 1, [(6, 5)], None, None, palu.nn.latent_layer.UNQUANTIZED)
    padding, length = (0, 5, 28), 40
    mask = torch.stack([torch.arange(length) >= each for each in padding])
    keys, values, votes = torch.randn(3, length, 6), torch.randn(3, length, 5), torch.rand(3, length)
    positions = torch.stack([(torch.arange(length) - each).clamp(min=0) for each in padding])
    layer.update(keys, values, positions, mask)
    assert layer.is_due(length)
    layer.drop(lambda: votes[:, None], length)
    for row, pad in enumerate(padding):
        row_votes = votes[row, pad:].tolist()
        row_votes[-4:] = [0.0] * 4
        count = min(17, length - pad)
        for side, buffer in ((keys, layer.key_buffer), (values, layer.value_buffer)):
            expected, places = plain_pooled(
                side[row, pad:], positions[row, pad:].tolist(), row_votes, 3, 4, count, pool_type
            )
            assert (buffer.tokens[row, -count:].double() - expected).abs().max() < 1e-6
            assert layer.position_buffer.tokens[row, -count:, 0].tolist() == places
        assert (layer.position_buffer.tokens[row, :-count] == -1).all()


def test_windows_are_as_equal_as_can_be():
    settings = TokenSparsity("pool", capacity=20, window_size=5, sink_tokens=2)
    tokens = Tokens.of(torch.ones(1, 57, dtype=torch.bool), settings)
    sizes = Windows.of(tokens, torch.tensor([20]), 20, settings).sizes[0].tolist()
    assert sizes[:2] == [1, 1]
    assert sizes[-5:] == [1] * 5
    assert set(sizes[2:-5]) == {3, 4}
    assert sum(sizes) == 57


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("h2o", {"capacity": 64}, "token_sparse_method 'h2o' is unknown; use one of snapkv, pyramidkv"),
        ("snapkv", {}, "give either prompt_capacity or prompt_capacity_rate"),
        ("snapkv", {"capacity": 64, "capacity_rate": 0.5}, "give either prompt_capacity or prompt_capacity_rate"),
        ("snapkv", {"capacity": 32}, "prompt_capacity 32 must be a number of at least 33"),
        ("streaming", {"capacity": 4}, "prompt_capacity 4 must be a number of at least 5"),
        ("pool", {"capacity_rate": 1.5}, r"prompt_capacity_rate 1.5 must lie in \(0, 1\]"),
        ("snapkv", {"capacity": 64, "kernel_size": 4}, "kernel_size 4 must be odd"),
        ("snapkv", {"capacity": 64, "window_size": 0}, "window_size 0 must be a number of tokens of at least 1"),
        (
            "streaming",
            {"capacity": 64, "kernel_size": 5},
            "kernel_size does nothing with token_sparse_method streaming",
        ),
        ("snapkv", {"capacity": 64, "pool_type": "mean"}, "pool_type does nothing with token_sparse_method snapkv"),
        ("pool", {"capacity": 64, "pool_type": "sum"}, "pool_type 'sum' must be one of mean, max, best"),
        ("pyramidkv", {"capacity": 64, "pyramid_beta": 0.5}, "pyramid_beta 0.5 must be a number of at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method, settings, message):
    with pytest.raises(PaluError, match=message):
        TokenSparsity(method, **settings)
