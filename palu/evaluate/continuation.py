"""How likely continuations are after contexts that have gone through the cache, as in generation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palu.core.validate import require
from palu.models import is_latent
from palu.nn.latent_cache import cache_nbytes

Tokens = Sequence[int]


class Continuation(NamedTuple):
    """A continuation's log likelihood, natural, and whether greedy decoding would give it."""

    log_likelihood: float
    is_greedy: bool


class Scores(NamedTuple):
    """What was found of every continuation, and what the cache held of the contexts.

    cache_bytes: of all rows together; cache_tokens: rows times the longest context.
    """

    continuations: list[Continuation]
    cache_bytes: int
    cache_tokens: int


@torch.no_grad()
def continuation_scores(
    model: PreTrainedModel, contexts: Sequence[Tokens], continuations: Sequence[tuple[int, Tokens]]
) -> Scores:
    """Read the contexts into the model's own cache, then the continuations behind them.

    What a cache does to its tokens after a prompt (dropping them, storing codes) thus shows in the scores: of all of an
    answer's tokens, as a context's last one is read behind the others.

    Args:
        contexts: token ids, one token at least; shorter ones are padded on the left.
        continuations: the context that each belongs to, and its token ids, one at least.

    Raises:
        PaluError: if a likelihood is not a number, or the model's policy drops nothing before decoding.
    """
    if is_latent(model) and model.config.latent.sparsity is not None:
        model.config.latent.sparsity.check_drops_before_decoding()
    # A context of one token is read whole.
    heads = [context[:-1] or context for context in contexts]
    lengths = torch.tensor([len(head) for head in heads], device=model.device)
    ids, mask = _padded(heads, "left", model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    held = cache_nbytes(cache)
    rows = torch.tensor([row for row, _ in continuations], device=model.device)
    cache.batch_select_indices(rows)
    # What is read now foretells the answer's tokens, the first of them too where the context's last one is among it.
    later = [[*contexts[row][len(heads[row]) :], *tokens[:-1]] or [0] for row, tokens in continuations]
    later_ids, later_mask = _padded(later, "right", model.device)
    positions = lengths[rows, None] + torch.arange(later_ids.shape[1], device=model.device)
    both = torch.cat([mask[rows], later_mask], dim=1)
    behind = model(later_ids, attention_mask=both, position_ids=positions, past_key_values=cache, use_cache=True).logits
    first = [len(heads[row]) == len(contexts[row]) for row, _ in continuations]
    logits = [
        torch.cat([output.logits[row, -1:], each]) if alone else each
        for row, alone, each in zip(rows.tolist(), first, behind, strict=True)
    ]
    found = [_scored(row, tokens) for row, (_, tokens) in zip(logits, continuations, strict=True)]
    return Scores(found, held, ids.numel())


def _padded(sequences: Sequence[Tokens], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [rows, longest], zero where there is none, and the mask of those that are tokens."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[row, where] = torch.tensor(list(sequence))
        mask[row, where] = 1
    return ids.to(device), mask.to(device)


def _scored(logits: Tensor, tokens: Tokens) -> Continuation:
    """From logits [at least as many as tokens, vocabulary]."""
    wanted = torch.tensor(list(tokens), device=logits.device)
    logs = torch.log_softmax(logits[: len(wanted)].float(), dim=-1)
    require(not bool(logs.isnan().any()), "the model's predictions are not finite")
    greedy = bool((logs.argmax(dim=-1) == wanted).all())
    return Continuation(logs.gather(1, wanted[:, None]).double().sum().item(), greedy)
