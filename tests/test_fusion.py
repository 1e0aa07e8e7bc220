"""Offline changes of the weights leave what the model computes as it is."""

import pytest
import torch

from palu.core.errors import PaluError
from palu.nn.fusion import fold_hadamard
from tests.helpers import FAMILIES, compressed, random_windows, tiny_model


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
