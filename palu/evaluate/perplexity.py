"""Perplexity over non-overlapping windows, and the bytes that the model really caches meanwhile."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from palu.core.errors import PaluError
from palu.core.progress import Progress, silent
from palu.nn.latent_cache import cache_bytes_per_token

# exp of more overflows a double.
MOST_NATS = 700.0
# Tokens whose logarithms of all probabilities are held at a time.
LOGITS_AT_A_TIME = 512


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one text.

    tokens: predicted tokens (one less than a window's length, times the windows).
    kv_bytes_per_token: bytes that the live cache held per token of context, over all layers.
    divergence: mean Kullback-Leibler divergence from the reference model's predictions, nats per token; None without.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    kv_bytes_per_token: float
    divergence: float | None = None


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int = 1,
    progress: Progress = silent,
    name: str = "perplexity",
    chunk: int | None = None,
    new_cache: Callable[[], Cache] | None = None,
    reference: PreTrainedModel | None = None,
) -> Perplexity:
    """`exp` of the mean next-token loss; every window starts with an empty cache.

    Args:
        windows: token ids, int64 [windows, seqlen].
        batch_size: windows at a time; the result does not depend on it beyond rounding.
        chunk: tokens per forward pass; the later ones read what the cache kept of the earlier ones. None: the window.
        new_cache: makes each window's cache; the model's own if None.
        reference: the model from whose predictions, of whole windows, the divergence is measured.

    Raises:
        PaluError: if the loss is not finite, naming the window.
    """
    total_loss, bytes_per_token, diverged = 0.0, 0.0, 0.0
    batches = windows.split(batch_size)
    with torch.no_grad():
        for index, batch in enumerate(progress(batches, name, len(batches))):
            ids = batch.to(model.device)
            expected = None if reference is None else reference(ids, use_cache=False).logits
            loss, nats, cache = _loss(model, ids, chunk or ids.shape[1], new_cache and new_cache(), expected)
            diverged += nats
            bytes_per_token = cache_bytes_per_token(cache)
            if not math.isfinite(loss):
                raise PaluError(f"{name}: the loss is not finite in window {index * batch_size} or just after it")
            total_loss += loss
    count, seqlen = windows.shape
    tokens = count * (seqlen - 1)
    mean = total_loss / tokens
    result = math.exp(mean) if mean < MOST_NATS else math.inf
    divergence = None if reference is None else diverged / windows.numel()
    return Perplexity(result, tokens, count, seqlen, bytes_per_token, divergence)


def _loss(
    model: PreTrainedModel, ids: Tensor, chunk: int, cache: Cache | None, expected: Tensor | None
) -> tuple[float, float, Cache]:
    """Summed next-token loss of windows [batch, seqlen], divergence from logits if given, and the cache at the end."""
    loss, nats = 0.0, 0.0
    for start in range(0, ids.shape[1], chunk):
        output = model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        following = ids[:, start + 1 : start + chunk + 1]
        for logits, labels in zip(output.logits, following, strict=True):
            loss += F.cross_entropy(logits[: len(labels)].float(), labels, reduction="sum").double().item()
        if expected is not None:
            for found, true in zip(output.logits, expected[:, start : start + chunk], strict=True):
                nats += _divergence(found, true)
    return loss, nats, cache


def _divergence(found: Tensor, true: Tensor) -> float:
    """Summed Kullback-Leibler divergence of logits [tokens, vocabulary] from true ones."""
    pieces = zip(found.split(LOGITS_AT_A_TIME), true.split(LOGITS_AT_A_TIME), strict=True)
    logs = ((F.log_softmax(piece.float(), -1), F.log_softmax(other.float(), -1)) for piece, other in pieces)
    return sum(F.kl_div(*pair, reduction="sum", log_target=True).double().item() for pair in logs)
