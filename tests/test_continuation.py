"""Likelihoods of continuations behind contexts that went through the cache."""

import pytest
import torch

import palu
from palu.evaluate.continuation import continuation_scores
from palu.token_sparsity import TokenSparsity
from tests.helpers import compressed, random_windows, tiny_model


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_scores_behind_a_context_equal_those_of_one_forward_pass(family):
    model = tiny_model(family)
    ids = random_windows(model, 3, 30)
    contexts = [ids[0, :20].tolist(), ids[1, :13].tolist(), ids[2, :1].tolist()]
    continuations = [(0, ids[0, 20:30].tolist()), (2, ids[2, 1:8].tolist()), (1, [7]), (0, ids[0, 20:22].tolist())]
    for each in (model, compressed(model).model):
        scores = continuation_scores(each, contexts, continuations)
        for (row, tokens), score in zip(continuations, scores.continuations, strict=True):
            whole = torch.tensor([contexts[row] + tokens])
            logs = model(whole).logits[0, -len(tokens) - 1 : -1].log_softmax(dim=-1)
            wanted = torch.tensor(tokens)
            assert score.log_likelihood == pytest.approx(logs.gather(1, wanted[:, None]).sum().item(), abs=1e-3)
            assert score.is_greedy == bool((logs.argmax(-1) == wanted).all())


@torch.no_grad()
def test_scores_change_with_what_a_policy_drops():
    latent = compressed(tiny_model("llama")).model
    ids = random_windows(latent, 2, 40)
    call = (latent, ids[:, :30].tolist(), [(row, ids[row, 30:].tolist()) for row in (0, 1, 0)])
    whole = continuation_scores(*call)
    palu.set_token_sparsity(latent, TokenSparsity("snapkv", capacity=10, window_size=4))
    dropped = continuation_scores(*call)
    assert whole.continuations[0] == whole.continuations[2]
    assert dropped.cache_bytes < 0.4 * whole.cache_bytes
    assert all(
        abs(one.log_likelihood - other.log_likelihood) > 1e-3
        for one, other in zip(whole.continuations, dropped.continuations, strict=True)
    )


@torch.no_grad()
def test_answers_of_one_token_are_scored_behind_what_is_left_too():
    latent = compressed(tiny_model("llama")).model
    ids = random_windows(latent, 1, 31)
    call = (latent, ids[:, :30].tolist(), [(0, ids[0, 30:].tolist())])
    (whole,) = continuation_scores(*call).continuations
    palu.set_token_sparsity(latent, TokenSparsity("snapkv", capacity=10, window_size=4))
    (dropped,) = continuation_scores(*call).continuations
    cache = latent(ids[:, :29]).past_key_values
    assert cache.layers[0].held == 10
    expected = latent(ids[:, 29:30], past_key_values=cache).logits[0, 0].log_softmax(-1)[ids[0, 30]].item()
    assert dropped.log_likelihood == pytest.approx(expected, abs=1e-4)
    assert abs(dropped.log_likelihood - whole.log_likelihood) > 1e-3
