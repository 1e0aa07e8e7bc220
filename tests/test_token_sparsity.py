"""Token policies: what they keep, and that a model decodes right over what they leave."""

import pytest
import torch

import palu
from palu.core.errors import PaluError
from palu.nn.latent_cache import LatentCache
from palu.nn.sparse_layer import SparseLatentLayer
from palu.sparse.registry import get_policy
from palu.token_sparsity import METHOD_SETTINGS
from tests.helpers import FAMILIES, compressed, left_padded_batch, random_windows, tiny_model
from tests.sparse_models import METHODS, compressed_with, positions_of, sparse


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_while_the_capacity_is_not_exceeded(family, method):
    latent = compressed(tiny_model(family), 0.5).model
    batch = left_padded_batch(latent)
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = latent.generate(**batch, **options)
    capacity = 36 if METHOD_SETTINGS[method].get("skip_prefill_compression") is not None else 24
    for settings in ({"capacity": capacity}, {"capacity_rate": 1.0}):
        palu.set_token_sparsity(latent, sparse(method, **settings))
        got = latent.generate(**batch, **options)
        assert torch.equal(got.sequences, expected.sequences)
        assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_decoding_drops_nothing_before_a_window_of_tokens_has_come(method):
    latent = compressed(tiny_model("llama"), 0.5).model
    ids = random_windows(latent, 2, 24)
    expected = latent.generate(ids, max_new_tokens=5, do_sample=False)
    palu.set_token_sparsity(latent, sparse(method, capacity=24))
    assert torch.equal(latent.generate(ids, max_new_tokens=5, do_sample=False), expected)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{"capacity": 12}, {"capacity_rate": 0.4}], ids=["capacity", "rate"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_padded_batch_generates_what_every_row_does_alone(family, method, settings):
    latent = compressed_with(tiny_model(family), sparse(method, **settings))
    batch = left_padded_batch(latent, 40)
    together = latent.generate(**batch, max_new_tokens=30, do_sample=False)
    for row, padding in enumerate((0, 3, 7)):
        alone = latent.generate(batch["input_ids"][row : row + 1, padding:], max_new_tokens=30, do_sample=False)
        assert torch.equal(alone[0], together[row, padding:])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("new", [1, 5, 12])
def test_later_tokens_attend_to_what_was_kept_and_to_nothing_else(family, attention, new):
    """Streaming keeps the same tokens everywhere, so that a mask of the uncompressed model says as much."""
    model = tiny_model(family, attention)
    latent = compressed_with(model, sparse("streaming", capacity=14, sink_tokens=2))
    ids = random_windows(model, 2, 40 + new, seed=int(torch.randint(1 << 30, ())))
    cache = latent(ids[:, :40]).past_key_values
    got = latent(ids[:, 40:], past_key_values=cache).logits
    visible = torch.ones(40 + new, 40 + new).tril().bool()
    visible[40:, 2 : 40 - 12] = False
    if family == "mistral":
        visible &= ~torch.ones_like(visible).tril(-11)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=mask[None, None].expand(2, -1, -1, -1)).logits[:, 40:]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("method", ["streaming", "pool"])
@pytest.mark.parametrize("skip", [False, True], ids=["both", "decoding only"])
def test_decoding_never_holds_more_than_the_capacity_and_a_window(method, skip):
    latent = compressed_with(tiny_model("llama"), sparse(method, capacity=12, skip_prefill_compression=skip))
    cache = LatentCache(latent.config)
    ids = random_windows(latent, 2, 60)
    latent(ids[:, :30], past_key_values=cache)
    assert cache.layers[0].held == (30 if skip else 12)
    for step in range(30, 60):
        latent(ids[:, step : step + 1], past_key_values=cache)
        assert 12 <= cache.layers[2].held <= 16
    newest = list(range(56, 60)) if method == "pool" else list(range(52, 60))
    for row in positions_of(cache, 1):
        assert row[-len(newest) :] == newest
        assert row[:4] == [0, 1, 2, 3]
        assert row == sorted(set(row))


@torch.no_grad()
def test_a_policy_that_drops_nothing_fails_loudly(monkeypatch):
    latent = compressed_with(tiny_model("llama"), sparse("snapkv", capacity=12))
    monkeypatch.setattr(SparseLatentLayer, "is_due", lambda self, new: False)
    with pytest.raises(PaluError, match="layer 0 holds 30 tokens after prefill, snapkv leaves 12"):
        latent(random_windows(latent, 1, 30))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prefill_in_chunks_stays_within_the_budget(family, method):
    latent = compressed_with(tiny_model(family), sparse(method, capacity=12))
    batch = left_padded_batch(latent, 41)
    output = latent.generate(**batch, max_new_tokens=3, prefill_chunk_size=9, return_dict_in_generate=True)
    cache = output.past_key_values
    assert cache.get_seq_length() == 43
    budgets = [get_policy(latent.config.latent.sparsity).kept(layer, 3, 41) for layer in range(3)]
    most = 10 if family == "mistral" else 41
    assert [layer.held for layer in cache.layers] == [min(budget + 2, most) for budget in budgets]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_beams_and_several_sequences_keep_their_rows_apart(method):
    latent = compressed_with(tiny_model("llama"), sparse(method, capacity_rate=0.4))
    batch = left_padded_batch(latent, 40)
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    together = latent.generate(**batch, **options)
    for row, padding in enumerate((0, 3, 7)):
        alone = latent.generate(batch["input_ids"][row : row + 1, padding:], **options)
        assert torch.equal(alone, together[2 * row : 2 * row + 2, padding : padding + alone.shape[1]])


@torch.no_grad()
def test_key_and_value_groups_of_different_sizes_share_their_tokens():
    latent = compressed_with(tiny_model("llama"), sparse("snapkv", capacity=12), head_group_size=1, value_group_size=2)
    cache = latent.generate(
        random_windows(latent, 2, 30), max_new_tokens=3, return_dict_in_generate=True
    ).past_key_values
    assert [layer.token_groups for layer in cache.layers] == [2, 2, 2]
    assert cache.layers[0].widths == [[32, 32], [32, 32]]


@torch.no_grad()
def test_values_folded_into_the_output_projection_are_kept_apart_too():
    model = tiny_model("llama", num_key_value_heads=8)
    settings = sparse("snapkv", capacity=12)
    apart, folded = (
        compressed_with(model, settings, ratio=0.25, head_group_size=4, fuse_values=fuse) for fuse in (False, True)
    )
    assert any(layer.fused_values for layer in folded.config.latent.layers)
    ids = random_windows(model, 2, 40)
    for latent in (apart, folded):
        latent.generation_config.eos_token_id = None
    expected, got = (latent.generate(ids, max_new_tokens=20, do_sample=False) for latent in (apart, folded))
    assert torch.equal(expected, got)


def test_what_cannot_be_combined_is_refused():
    latent = compressed(tiny_model("llama")).model
    palu.set_token_sparsity(latent, sparse("snapkv", capacity=12))
    ids = random_windows(latent, 1, 20)
    with pytest.raises(PaluError, match="fixed capacity cannot drop tokens"):
        LatentCache(latent.config, capacity=30)
    with pytest.raises(PaluError, match="assisted decoding needs a cache that drops no tokens"):
        latent.generate(ids, max_new_tokens=3, prompt_lookup_num_tokens=2)
    with pytest.raises(PaluError, match="lt_sinks and lt_window"):
        palu.set_quantization(latent, palu.QuantizationConfig(key_bits=4, value_bits=4, window=8))


@torch.no_grad()
def test_a_saved_model_keeps_its_policy(tmp_path):
    latent = compressed_with(tiny_model("llama"), sparse("pool", capacity_rate=0.5, pool_type="best"))
    latent.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.latent.sparsity == latent.config.latent.sparsity
    ids = random_windows(latent, 1, 40)
    assert torch.equal(again(ids).logits, latent(ids).logits)
    assert again(ids).past_key_values.layers[0].held == 20
