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


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one text.

    tokens: predicted tokens (one less than a window's length, times the windows).
    kv_bytes_per_token: bytes that the live cache held per token of context, over all layers.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    kv_bytes_per_token: float


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int = 1,
    progress: Progress = silent,
    name: str = "perplexity",
    chunk: int | None = None,
    new_cache: Callable[[], Cache] | None = None,
) -> Perplexity:
    """`exp` of the mean next-token loss; every window starts with an empty cache.

    Args:
        windows: token ids, int64 [windows, seqlen].
        batch_size: windows at a time; the result does not depend on it beyond rounding.
        chunk: tokens per forward pass; the later ones read what the cache kept of the earlier ones. None: the window.
        new_cache: makes each window's cache; the model's own if None.

    Raises:
        PaluError: if the loss is not finite, naming the window.
    """
    total_loss, bytes_per_token = 0.0, 0.0
    batches = windows.split(batch_size)
    with torch.no_grad():
        for index, batch in enumerate(progress(batches, name, len(batches))):
            loss, cache = _loss(model, batch.to(model.device), chunk or batch.shape[1], new_cache and new_cache())
            bytes_per_token = cache_bytes_per_token(cache)
            if not math.isfinite(loss):
                raise PaluError(f"{name}: the loss is not finite in window {index * batch_size} or just after it")
            total_loss += loss
    count, seqlen = windows.shape
    tokens = count * (seqlen - 1)
    mean = total_loss / tokens
    return Perplexity(math.exp(mean) if mean < MOST_NATS else math.inf, tokens, count, seqlen, bytes_per_token)


def _loss(model: PreTrainedModel, ids: Tensor, chunk: int, cache: Cache | None) -> tuple[float, Cache]:
    """Summed next-token loss of windows [batch, seqlen], and the cache at their end."""
    loss = 0.0
    for start in range(0, ids.shape[1], chunk):
        output = model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        following = ids[:, start + 1 : start + chunk + 1]
        for logits, labels in zip(output.logits, following, strict=True):
            loss += F.cross_entropy(logits[: len(labels)].float(), labels, reduction="sum").double().item()
    return loss, cache
