"""At full rank a compressed model is the original: logits, greedy tokens, every way of generating."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from palu.nn.latent_cache import LatentCache
from palu.nn.latent_layer import LatentLayer
from palu.nn.masks import decode_mask
from tests.helpers import FAMILIES, compressed, left_padded_batch, random_windows, tiny_model

TOLERANCE = 1e-4


def max_difference(a, b, mask=None):
    difference = (a - b).abs().amax(dim=-1)
    return (difference if mask is None else difference[mask.bool()]).max().item()


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request):
    """A stock model and its full-rank compression; keys and values grouped differently."""
    model = tiny_model(request.param)
    return model, compressed(model, head_group_size=2, value_group_size="all").model


@torch.no_grad()
def test_logits_equal_with_left_padding(pair):
    model, latent = pair
    batch = left_padded_batch(model)
    expected, got = model(**batch).logits, latent(**batch).logits
    assert max_difference(expected, got, batch["attention_mask"]) < TOLERANCE


@torch.no_grad()
def test_greedy_tokens_equal_over_128_steps_with_left_padding(pair):
    model, latent = pair
    options = {"max_new_tokens": 128, "do_sample": False}
    batch = left_padded_batch(model)
    assert torch.equal(model.generate(**batch, **options), latent.generate(**batch, **options))


@torch.no_grad()
def test_sampled_tokens_equal_for_equal_seeds(pair):
    batch = left_padded_batch(pair[0])
    texts = []
    for candidate in pair:
        torch.manual_seed(7)
        texts.append(candidate.generate(**batch, max_new_tokens=16, do_sample=True, top_k=5))
    assert torch.equal(*texts)


@torch.no_grad()
def test_prefill_in_chunks_equals_prefill_at_once(pair):
    model, latent = pair
    ids = random_windows(model, 2, 40)
    expected = model(ids).logits
    cache = LatentCache(latent.config)
    parts = [latent(chunk, past_key_values=cache).logits for chunk in ids.split([13, 1, 17, 3, 6], dim=1)]
    assert max_difference(expected, torch.cat(parts, dim=1)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"num_return_sequences": 2, "num_beams": 2},
        {"prefill_chunk_size": 5},
    ],
    ids=["beam search", "fixed capacity", "several beams returned", "chunked prefill"],
)
def test_generate_variants_equal(pair, options):
    model, latent = pair
    batch = left_padded_batch(model)
    options = options | {"max_new_tokens": 40, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), latent.generate(**batch, **options))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("chunk", [None, 3], ids=["at once", "in chunks"])
def test_fixed_capacity_with_short_unpadded_prompts(pair, length, chunk):
    model, latent = pair
    ids = random_windows(model, 2, length)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    options = {"cache_implementation": "static", "prefill_chunk_size": chunk}
    assert torch.equal(expected, latent.generate(ids, max_new_tokens=20, do_sample=False, **options))
    cache = LatentCache(latent.config, capacity=40)
    got = latent(ids, past_key_values=cache, attention_mask=torch.ones_like(ids)).logits
    assert max_difference(model(ids).logits, got) < TOLERANCE


@torch.no_grad()
def test_assisted_decoding_crops_the_cache_correctly(pair):
    model, latent = pair
    ids = random_windows(model, 1, 20)
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    # A draft of the model's own text with errors now and then, so that tokens are both accepted and rolled back.
    assistant = tiny_model("llama", seed=1)
    assert torch.equal(expected, latent.generate(ids, max_new_tokens=40, do_sample=False, assistant_model=assistant))
    assert torch.equal(expected, latent.generate(ids, max_new_tokens=40, do_sample=False, assistant_model=model))
    assert torch.equal(expected, latent.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=3))


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda c: DynamicCache(),
        lambda c: DynamicCache(config=c),
        lambda c: StaticCache(config=c, max_cache_len=60),
        LatentCache,
    ],
)
def test_a_cache_that_the_user_passes_holds_latents(pair, make):
    model, latent = pair
    batch = left_padded_batch(model)
    cache = make(latent.config)
    got = latent.generate(**batch, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert torch.equal(model.generate(**batch, max_new_tokens=20, do_sample=False), got)
    assert all(isinstance(layer, LatentLayer) for layer in cache.layers)


@torch.no_grad()
def test_no_cache_at_all_gives_the_same_logits(pair):
    model, latent = pair
    batch = left_padded_batch(model)
    output = latent(**batch, use_cache=False)
    assert output.past_key_values is None
    assert max_difference(model(**batch).logits, output.logits, batch["attention_mask"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("group_sizes", [(1, 1), (1, "all"), ("all", 2)], ids=str)
def test_every_group_size_is_exact_at_full_rank(family, group_sizes):
    model = tiny_model(family)
    latent = compressed(model, head_group_size=group_sizes[0], value_group_size=group_sizes[1]).model
    ids = random_windows(model, 2, 30)
    assert max_difference(model(ids).logits, latent(ids).logits) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("length", [20, 2], ids=["prefill", "on latents"])
def test_eager_attention_returns_weights_and_hidden_states(length):
    model = tiny_model("qwen3", attention="eager")
    latent = compressed(model).model
    ids = random_windows(model, 2, length)
    options = {"output_attentions": True, "output_hidden_states": True}
    expected, got = model(ids, **options), latent(ids, **options)
    assert max_difference(expected.logits, got.logits) < TOLERANCE
    for name in ("attentions", "hidden_states"):
        assert len(got[name]) == len(expected[name]) > 0
        assert all(max_difference(a, b) < TOLERANCE for a, b in zip(expected[name], got[name], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 4])
def test_two_dimensional_masks_of_flash_attention_hide_padding_and_future(queries):
    model = tiny_model("mistral")
    latent = compressed(model).model
    attention = latent.model.layers[0].self_attn
    padding = torch.ones(2, 20, dtype=torch.int64)
    padding[0, :9] = 0
    query = torch.empty(2, 8, queries, 16)
    mask = decode_mask(padding, query, 20, 20, attention.sliding_window).expand(2, 1, queries, 20)
    for query in range(queries):
        position = 20 - queries + query
        visible = [t <= position and t > position - attention.sliding_window for t in range(20)]
        expected = torch.tensor([visible, visible]) & padding.bool()
        assert torch.equal(mask[:, 0, query], expected)


@torch.no_grad()
def test_demo_model_is_reproduced_at_full_rank(demo_model, demo_tokenizer):
    latent = compressed(demo_model, head_group_size=4).model
    prompts = ["It was", "The old man went down to the sea, and there he", "'Upon my word,' said", "Chapter"]
    demo_tokenizer.padding_side = "left"
    batch = demo_tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    expected, got = demo_model(**batch).logits, latent(**batch).logits
    assert max_difference(expected, got, batch["attention_mask"]) < TOLERANCE
    options = {"max_new_tokens": 128, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(demo_model.generate(**batch, **options), latent.generate(**batch, **options))


def stand_in_for_flash_attention(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
    """Flash attention's calling convention in plain PyTorch: 2D padding mask, causal from the bottom right."""
    assert attention_mask is None or attention_mask.ndim == 2
    queries, length = query.shape[2], key.shape[2]
    behind = torch.arange(length - queries, length)[:, None] - torch.arange(length)
    visible = (behind >= 0) & (behind < (sliding_window or length))
    visible = visible[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, -length:].bool()
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~visible, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_calling_convention_of_flash_attention_gives_equal_tokens(family, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", stand_in_for_flash_attention)
    model = tiny_model(family)
    latent = compressed(model).model
    for candidate in (model, latent):
        candidate.config._attn_implementation = "flash_attention_2"
    for batch in (left_padded_batch(model), {"input_ids": random_windows(model, 2, 5)}):
        expected = model.generate(**batch, max_new_tokens=30, do_sample=False)
        assert torch.equal(expected, latent.generate(**batch, max_new_tokens=30, do_sample=False))
