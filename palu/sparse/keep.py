"""From what tokens are worth to which stay: selection, and merging by windows."""

from typing import NamedTuple

import torch
from torch import Tensor

from palu.token_sparsity import TokenSparsity


class Tokens(NamedTuple):
    """The tokens that one cache holds of every row.

    valid: whether a slot holds a token, bool [batch, length]; places: every token's place among its row's; behind: its
    place from the end, 1 for the newest; always: tokens that no budget takes away.
    """

    valid: Tensor
    places: Tensor
    behind: Tensor
    always: Tensor

    @classmethod
    def of(cls, valid: Tensor, settings: TokenSparsity) -> "Tokens":
        """Count the valid ones."""
        places = valid.cumsum(dim=1) - 1
        behind = valid.sum(dim=1, keepdim=True) - places
        newest = settings.always_kept - settings.sink_tokens
        return cls(valid, places, behind, valid & ((places < settings.sink_tokens) | (behind <= newest)))


def best_tokens(scores: Tensor, tokens: Tokens, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The tokens of the highest scores, earlier ones where scores are equal.

    Args:
        scores: [batch, length].
        counts: how many each row keeps, int64 [batch], no more than it has; most: the largest of them.

    Returns:
        Their slots in order, int64 [batch, most], and which of these are tokens, bool of the same shape: the
        rows that keep less have the others in front.
    """
    scores = scores.masked_fill(tokens.always, torch.inf).masked_fill(~tokens.valid, -torch.inf)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :most]
    spare = torch.arange(most, device=best.device) >= counts[:, None]
    ordered = best.masked_fill(spare, -1).sort(dim=1).values
    return ordered.clamp(min=0), ordered >= 0


class Windows(NamedTuple):
    """Consecutive tokens that become one.

    window: every token's window, int64 [batch, length]; of slots without a token, the number of windows.
    sizes: tokens in every window, int64 [batch, windows]; none in front of rows that keep less.
    """

    window: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, tokens: Tokens, counts: Tensor, most: int, settings: TokenSparsity) -> "Windows":
        """Sinks and newest tokens alone, those between in windows as equal as can be, `counts` [batch] in all.

        most: the largest of the counts.
        """
        sinks, newest = settings.sink_tokens, settings.always_kept - settings.sink_tokens
        places, held, counts = tokens.places, tokens.valid.sum(dim=1, keepdim=True), counts[:, None]
        between, left = (held - sinks - newest).clamp(min=1), counts - sinks - newest
        middle = sinks + (places - sinks) * left // between
        window = torch.where(places < sinks, places, middle)
        window = torch.where(held - places <= newest, counts - (held - places), window)
        window = torch.where(tokens.valid, window + most - counts, most)
        sizes = torch.zeros(len(window), most + 1, dtype=torch.int64, device=window.device)
        return cls(window, sizes.scatter_add_(1, window, torch.ones_like(window))[:, :-1])

    def total(self, values: Tensor) -> Tensor:
        """Sums over every window: [batch, length, ...] -> [batch, windows, ...]."""
        return self._reduced(values, "sum", 0)

    def largest(self, values: Tensor) -> Tensor:
        """Largest of every window, elementwise."""
        return self._reduced(values, "amax", -torch.inf)

    def representatives(self, scores: Tensor) -> Tensor:
        """The slot of the highest score in every window, the first of equal ones: int64 [batch, windows]."""
        peaks = torch.nn.functional.pad(self.largest(scores), (0, 1))
        slots = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        behind = torch.where(scores == peaks.gather(1, self.window), slots, scores.shape[1] - 1)
        return self._reduced(behind, "amin", scores.shape[1] - 1)

    def mean_positions(self, positions: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean positions, rounded: int32 [batch, windows]; plain means where all weights are zero."""
        weights, positions = weights.double(), positions.double()
        total = self.total(weights)
        weighted = self.total(weights * positions) / total.clamp(min=torch.finfo(torch.float64).tiny)
        plain = self.total(positions) / self.sizes.clamp(min=1)
        return torch.where(total > 0, weighted, plain).round().int()

    def _reduced(self, values: Tensor, how: str, start: float) -> Tensor:
        shape = (len(values), self.sizes.shape[1] + 1, *values.shape[2:])
        window = self.window.view(*self.window.shape, *[1] * (values.ndim - 2)).expand_as(values)
        return values.new_full(shape, start).scatter_reduce_(1, window, values, how)[:, :-1]
