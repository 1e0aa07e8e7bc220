"""The cache holds what it says: bytes, positions, growth, cropping."""

import pytest
import torch
from transformers import DynamicCache

import palu
from palu.core.errors import PaluError
from palu.kernels.quantize import Quantization
from palu.nn.latent_cache import LatentCache, adopt_cache, cache_bytes_per_token, cache_nbytes
from palu.nn.latent_layer import LatentLayer
from palu.nn.packed_buffer import PackedBuffer
from palu.nn.token_buffer import TokenBuffer
from tests.helpers import compressed, left_padded_batch, random_windows, tiny_model


@torch.no_grad()
def test_live_bytes_at_half_are_half_the_original_plus_positions():
    model = tiny_model("llama").to(torch.bfloat16)
    latent = compressed(model.float(), 0.5).model.to(torch.bfloat16)
    model = model.to(torch.bfloat16)
    ids = random_windows(model, 3, 40)
    full = cache_bytes_per_token(model(ids).past_key_values)
    cache = latent(ids).past_key_values
    assert full == 2 * 3 * 4 * 16 * 2
    assert cache.bytes_per_token() <= 0.5 * full + 8
    held = sum(t.nbytes for layer in cache.layers for t in (layer.key_buffer.tokens, layer.value_buffer.tokens))
    assert cache.nbytes() == held + 3 * 40 * 4
    assert cache.allocated_nbytes() == cache.nbytes()


@torch.no_grad()
def test_generation_never_allocates_beyond_its_length():
    latent = compressed(tiny_model("llama"), 0.5).model
    output = latent.generate(random_windows(latent, 2, 30), max_new_tokens=9, return_dict_in_generate=True)
    cache = output.past_key_values
    assert cache.get_seq_length() == 38
    per_token = cache.bytes_per_token() * 2
    assert cache.nbytes() == 38 * per_token
    assert cache.allocated_nbytes() <= 39 * per_token


@torch.no_grad()
@pytest.mark.parametrize("implementation", [None, "static"])
def test_sliding_layers_hold_no_more_than_the_window(implementation):
    latent = compressed(tiny_model("mistral")).model
    output = latent.generate(
        random_windows(latent, 1, 30),
        max_new_tokens=50,
        cache_implementation=implementation,
        return_dict_in_generate=True,
        do_sample=False,
    )
    for layer in output.past_key_values.layers:
        assert layer.nbytes() <= 11 * (2 * 64 * 4 + 4)
        assert layer.allocated_nbytes() <= (4 * 11 + 16) * (2 * 64 * 4 + 4)


@torch.no_grad()
def test_positions_of_left_padded_rows_are_their_own():
    latent = compressed(tiny_model("llama")).model
    batch = left_padded_batch(latent, 12)
    output = latent.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    positions = output.past_key_values.layers[0].position_buffer.tokens[..., 0]
    for row, padding in enumerate((0, 3, 7, 11)):
        assert positions[row, padding:].tolist() == list(range(14 - padding))


def test_layers_of_one_window_share_their_positions():
    cache = LatentCache(compressed(tiny_model("qwen2")).model.config)
    assert [layer.leader is None for layer in cache.layers] == [True, True, False]
    assert [layer.is_sliding for layer in cache.layers] == [False, True, True]


def test_buffer_grows_by_doubling_and_reuses_dropped_room():
    buffer, expected, copies = TokenBuffer(), torch.empty(2, 0, 3), 0
    for _ in range(300):
        token = torch.randn(2, 1, 3)
        before = buffer.storage
        buffer.append(token)
        copies += buffer.storage is not before
        expected = torch.cat([expected, token], dim=1)
        assert torch.equal(buffer.tokens, expected)
    assert copies <= 10
    for _ in range(300):
        buffer.drop_front(len(buffer) - 20)
        buffer.append(torch.randn(2, 1, 3))
    assert buffer.storage.shape[1] <= 600


def test_buffer_growth_is_bounded_where_the_length_is_known():
    buffer = TokenBuffer()
    buffer.append(torch.zeros(1, 100, 2), max_length=110)
    buffer.append(torch.zeros(1, 1, 2), max_length=110)
    assert buffer.storage.shape[1] == 110


@pytest.mark.parametrize(
    "make", [TokenBuffer, lambda: PackedBuffer(Quantization(4, (32, 16)))], ids=["numbers", "codes"]
)
def test_tokens_that_do_not_fit_leave_a_buffer_as_it_was(make):
    buffer = make()
    buffer.append(torch.randn(2, 3, 48))
    for shape in ((2, 1, 47), (1, 1, 48), (3, 1, 48)):
        with pytest.raises((ValueError, RuntimeError)):
            buffer.append(torch.randn(shape))
        assert [len(part) for part in buffer.parts] == [3] * len(buffer.parts)


@pytest.mark.parametrize("window", [None, 6])
def test_layer_equals_a_plain_list_under_random_operations(window):
    """Random appends, crops and row selections against tensors that are simply concatenated."""
    layer = LatentLayer(sliding_window=window)
    layer.activate_past_recording()
    keys, positions = torch.empty(3, 0, 5), torch.empty(3, 0, dtype=torch.int64)
    for step in range(60):
        new = int(torch.randint(1, 5, ()))
        latents, ids = torch.randn(3, new, 5), torch.randint(0, 1000, (3, new))
        keys, positions = torch.cat([keys, latents], 1), torch.cat([positions, ids], 1)
        length, offset = layer.get_mask_sizes(new)
        seen, _ = layer.update(latents, latents, ids)
        visible = keys.shape[1] if window is None else min(keys.shape[1], window - 1 + new)
        assert (length, offset) == (visible, keys.shape[1] - visible)
        assert torch.equal(seen, keys[:, -visible:])
        assert torch.equal(layer.positions, positions[:, -visible:].int())
        removed = int(torch.randint(0, new + 1, ()))
        layer.crop(-removed)
        keys, positions = keys[:, : keys.shape[1] - removed], positions[:, : positions.shape[1] - removed]
        if step % 7 == 0:
            rows = torch.randperm(3)
            layer.reorder_cache(rows)
            keys, positions = keys[rows], positions[rows]
        assert layer.get_seq_length() == keys.shape[1]


@torch.no_grad()
def test_a_fixed_capacity_is_as_large_as_asked_for_and_never_smaller_than_one_before():
    """Compiled steps would have to be compiled again for every prompt."""
    latent = compressed(tiny_model("llama")).model

    def capacity(length, **asked):
        settings = {"max_new_tokens": 4, "cache_implementation": "static", "return_dict_in_generate": True}
        output = latent.generate(random_windows(latent, 1, length), **settings, **asked)
        return output.past_key_values.get_max_length()

    assert [capacity(20), capacity(8), capacity(30), capacity(8)] == [23, 23, 33, 33]
    if hasattr(latent.generation_config, "max_cache_len"):
        assert [capacity(8, max_cache_len=60), capacity(40)] == [60, 60]


@torch.no_grad()
@pytest.mark.parametrize("make", [LatentCache, lambda config: adopted(DynamicCache(), config)], ids=["own", "foreign"])
def test_a_cache_made_before_the_settings_changed_is_made_anew_or_refused(make):
    latent = compressed(tiny_model("llama")).model
    ids = random_windows(latent, 1, 40)
    cache, filled = make(latent.config), make(latent.config)
    latent(ids, past_key_values=filled)
    palu.set_cache(latent, palu.QuantizationConfig(4, 4), palu.TokenSparsity("snapkv", capacity=36))
    output = latent.generate(ids, max_new_tokens=2, past_key_values=cache, return_dict_in_generate=True)
    expected = latent.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert cache_nbytes(output.past_key_values) == expected.past_key_values.nbytes()
    assert all(layer.has_dropped for layer in cache.layers)
    with pytest.raises(PaluError, match="filled before the model's codes or token policy changed"):
        latent(ids[:, :1], past_key_values=filled)


@torch.no_grad()
def test_a_fixed_cache_that_is_reset_takes_new_settings():
    latent = compressed(tiny_model("llama")).model
    ids, cache = random_windows(latent, 1, 20), LatentCache(latent.config, capacity=24)
    latent(ids, past_key_values=cache)
    palu.set_quantization(latent, palu.QuantizationConfig(4, 4))
    cache.reset()
    latent(ids, past_key_values=cache)
    assert (
        cache.nbytes() == latent(ids, past_key_values=LatentCache(latent.config, capacity=24)).past_key_values.nbytes()
    )


def adopted(cache, config):
    adopt_cache(cache, config)
    return cache


def test_a_cache_of_full_keys_is_refused():
    model = tiny_model("llama")
    latent = compressed(model).model
    ids = random_windows(model, 1, 8)
    with torch.no_grad():
        full = model(ids).past_key_values
        with pytest.raises(PaluError, match="holds full keys and values"):
            latent(ids, past_key_values=full)
    with pytest.raises(PaluError, match="use dynamic or static"):
        latent.generate(ids, max_new_tokens=2, cache_implementation="offloaded")


@torch.no_grad()
def test_fixed_capacity_says_so_when_it_is_full_and_can_be_reset():
    latent = compressed(tiny_model("llama")).model
    ids = random_windows(latent, 1, 12)
    cache = LatentCache(latent.config, capacity=12)
    first = latent(ids, past_key_values=cache).logits
    with pytest.raises(PaluError, match="fixed capacity of 12"):
        latent(ids[:, :1], past_key_values=cache)
    storage = cache.layers[0].key_buffer.storage
    cache.reset()
    assert torch.allclose(latent(ids, past_key_values=cache).logits, first)
    assert cache.layers[0].key_buffer.storage is storage


@torch.no_grad()
def test_a_long_prompt_does_not_leave_its_memory_behind_in_a_sliding_layer():
    latent = compressed(tiny_model("mistral")).model
    cache = latent(random_windows(latent, 1, 400)).past_key_values
    assert cache.allocated_nbytes() == cache.nbytes()
    assert cache.layers[0].key_buffer.storage.shape[1] == 10


@torch.no_grad()
def test_new_tokens_for_another_number_of_rows_are_refused():
    latent = compressed(tiny_model("llama")).model
    ids = random_windows(latent, 2, 9)
    for cache in (LatentCache(latent.config), LatentCache(latent.config, capacity=20)):
        latent(ids, past_key_values=cache)
        with pytest.raises(PaluError, match="holds 2 rows, the new tokens have 1"):
            latent(ids[:1, :1], past_key_values=cache)
        assert cache.get_seq_length() == 9


@torch.no_grad()
def test_an_emptied_cache_has_no_bytes_per_token():
    latent = compressed(tiny_model("llama")).model
    ids = random_windows(latent, 2, 9)
    growing, fixed = LatentCache(latent.config), LatentCache(latent.config, capacity=20)
    for cache in (growing, fixed):
        latent(ids, past_key_values=cache)
        assert cache.bytes_per_token() > 0
    growing.crop(-1000)
    fixed.reset()
    assert growing.bytes_per_token() == fixed.bytes_per_token() == 0


@torch.no_grad()
def test_reordering_a_fixed_cache_does_not_move_its_tensors():
    latent = compressed(tiny_model("llama")).model
    cache = LatentCache(latent.config, capacity=20)
    latent(random_windows(latent, 3, 9), past_key_values=cache)
    storage = cache.layers[1].key_buffer.storage
    expected = storage[[2, 0, 0]].clone()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.layers[1].key_buffer.storage is storage
    assert torch.equal(storage, expected)


@torch.no_grad()
def test_a_reset_growing_cache_starts_anew():
    latent = compressed(tiny_model("mistral")).model
    ids = random_windows(latent, 2, 14)
    cache = LatentCache(latent.config)
    first = latent(ids, past_key_values=cache).logits
    cache.reset()
    assert cache.nbytes() == 0
    assert torch.equal(latent(ids, past_key_values=cache).logits, first)


def test_bytes_of_a_stock_cache_are_counted_too():
    model = tiny_model("llama")
    assert cache_nbytes(DynamicCache()) == 0
    with torch.no_grad():
        cache = model(random_windows(model, 2, 10)).past_key_values
    assert cache_nbytes(cache) == 2 * 10 * 3 * 2 * 64 * 4
