"""Offline changes of the weights leave what the model computes as it is."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import palu
from palu.core import hadamard
from palu.core.errors import PaluError
from palu.kernels.latents import dense
from palu.nn import latent_attention
from palu.nn.fusion import fold_hadamard, fold_values, fusion_sizes
from tests.helpers import FAMILIES, compressed, left_padded_batch, random_windows, tiny_model

# Ranks of one head each are no larger than a head, so that folding pays.
FUSED = {"head_group_size": 2, "value_group_size": 1}


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_hadamard_turn_changes_the_latents_but_not_the_logits(family):
    latent = compressed(tiny_model(family), 0.6, search_method="fisher_uniform", value_group_size="all").model
    turned = compressed(
        tiny_model(family), 0.6, search_method="fisher_uniform", value_group_size="all", lt_hadamard=True
    ).model
    ids = random_windows(latent, 2, 30)
    assert turned.config.latent.hadamard
    assert turned.config.latent.layers == latent.config.latent.layers
    before, after = latent(ids), turned(ids)
    assert torch.allclose(before.logits, after.logits, atol=1e-4)
    a, b = (output.past_key_values.layers[0].key_buffer.tokens for output in (before, after))
    assert not torch.allclose(a, b, atol=1e-2)
    assert torch.allclose(a.square().sum(), b.square().sum(), rtol=1e-4)


def test_a_second_turn_does_nothing():
    latent = compressed(tiny_model("llama"), 0.5).model
    fold_hadamard(latent)
    before = {name: tensor.clone() for name, tensor in latent.state_dict().items()}
    fold_hadamard(latent)
    assert all(torch.equal(before[name], tensor) for name, tensor in latent.state_dict().items())


def test_a_rank_without_a_hadamard_matrix_is_named_and_nothing_is_changed():
    latent = compressed(tiny_model("llama"), 0.5, rank_multiple=1, head_group_size="all", search_method="fisher").model
    assert any(rank % 4 for layer in latent.config.latent.layers for rank in (*layer.key, *layer.value))
    before = latent.model.layers[0].self_attn.k_proj.up.clone()
    with pytest.raises(PaluError, match=r"no Hadamard matrix of order .* nearest is"):
        fold_hadamard(latent)
    assert torch.equal(before, latent.model.layers[0].self_attn.k_proj.up)
    assert not latent.config.latent.hadamard


@torch.no_grad()
@pytest.mark.parametrize("order", [8, 24, 96, 12, 2])
def test_a_fast_kernel_gives_the_same_turn(order, monkeypatch):
    rows = torch.randn(order, 7, dtype=torch.float64)
    expected = hadamard.hadamard_transform(rows)
    assert torch.allclose(expected, hadamard.orthonormal_hadamard(order) @ rows)

    def butterflies(x, scale):
        """The interface of fast_hadamard_transform: Sylvester's matrix along the last dimension."""
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        size = x.shape[-1]
        step = 1
        while step < size:
            x = x.view(*x.shape[:2], -1, 2, step)
            x = torch.stack((x[..., 0, :] + x[..., 1, :], x[..., 0, :] - x[..., 1, :]), dim=-2).flatten(2)
            step *= 2
        return x * scale

    monkeypatch.setattr(hadamard, "_fast_transform", lambda device: butterflies)
    assert torch.allclose(hadamard.hadamard_transform(rows).double(), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_values_folded_into_o_proj_change_nothing(family, attention):
    model = tiny_model(family, attention)
    latent = compressed(model, **FUSED).model
    assert all(layer.fused_values for layer in latent.config.latent.layers)
    assert latent.model.layers[0].self_attn.v_proj.up is None
    ids = random_windows(model, 3, 40)
    assert torch.allclose(model(ids).logits, latent(ids).logits, atol=1e-4)
    batch, settings = left_padded_batch(model), {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**batch, **settings)
    assert torch.equal(expected, latent.generate(**batch, **settings))
    assert torch.equal(expected, latent.generate(**batch, **settings, cache_implementation="static"))
    assert torch.equal(expected, latent.generate(**batch, **settings, prefill_chunk_size=7))


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_uneven_folded_ranks_quantised_and_turned_equal_those_apart(family, tmp_path):
    options = {"ratio": 0.6, "search_method": "fisher", **FUSED}
    # float64, so that rounding does not tip a code over.
    model = tiny_model(family).double()
    folded, apart = (compressed(model, fuse_values=fuse, **options).model for fuse in (True, False))
    assert any(layer.fused_values for layer in folded.config.latent.layers)
    assert len({rank for layer in folded.config.latent.layers for rank in layer.value}) > 1
    ids = random_windows(folded, 2, 30)
    assert torch.allclose(folded(ids).logits, apart(ids).logits, atol=1e-4)
    settings = palu.QuantizationConfig(4, 8)
    for model in (folded, apart):
        fold_hadamard(model)
        palu.set_quantization(model, settings)
    assert torch.allclose(folded(ids).logits, apart(ids).logits, atol=1e-4)
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, folded(ids).logits)
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in apart.parameters())


@torch.no_grad()
def test_folded_prefill_in_parts_reads_only_the_latents_of_its_heads(monkeypatch):
    latent = compressed(tiny_model("llama"), **FUSED).model
    palu.set_quantization(latent, palu.QuantizationConfig(4, 4))
    ids = random_windows(latent, 2, 30)
    expected = latent(ids).logits
    counts = []
    monkeypatch.setattr(
        latent_attention, "dense", lambda latents, *args: counts.append(args[-1]) or dense(latents, *args)
    )
    monkeypatch.setattr(latent_attention, "REBUILT_BYTES", 2 * 2 * 30 * 16 * 4)
    assert torch.allclose(latent(ids).logits, expected, atol=1e-5)
    assert counts == [rank for layer in latent.config.latent.layers for rank in layer.value]


def test_weights_of_classes_from_a_checkpoint_are_not_pretended_to_be_changed():
    latent = compressed(tiny_model("llama"), 0.5).model
    for layer in latent.model.layers:
        layer.self_attn = torch.nn.Identity()
    for fold in (fold_hadamard, fold_values):
        with pytest.raises(PaluError, match="import palu before loading"):
            fold(latent)
    assert not latent.config.latent.hadamard


def test_values_stay_apart_where_folding_would_be_larger():
    latent = compressed(tiny_model("llama"), head_group_size=2).model
    sizes = fusion_sizes(latent.config)
    assert not any(size.pays or size.fits for size in sizes)
    assert sizes[0].apart == 64 * 8 * 16 + 32 * 64
    assert sizes[0].folded == 64 * 8 * 32
    assert fold_values(latent) == 0
    assert latent.model.layers[0].self_attn.v_proj.up is not None


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_prefill_a_few_heads_at_a_time_gives_the_same(family, monkeypatch):
    latent = compressed(tiny_model(family, "eager"), 0.75).model
    ids = random_windows(latent, 2, 30)
    expected = latent(ids, output_attentions=True)
    monkeypatch.setattr("palu.nn.latent_attention.REBUILT_BYTES", 2 * 2 * 2 * 30 * 16 * 4)
    got = latent(ids, output_attentions=True)
    assert torch.allclose(got.logits, expected.logits, atol=1e-5)
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
