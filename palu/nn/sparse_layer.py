"""A cache layer that keeps only some tokens: every token group its own, as a policy says."""

from collections.abc import Callable, Sequence
from itertools import starmap

import torch
from torch import Tensor

from palu.core.errors import PaluError
from palu.kernels.latents import Latents, dense
from palu.nn.latent_layer import LatentLayer, LayerQuantization
from palu.sparse.base import TokenPolicy
from palu.sparse.keep import Tokens, Windows, best_tokens

# Position of a slot without a token.
NOWHERE = -1
# Gives the attention that the newest queries pay to the tokens, float32 [batch, token groups, length].
Votes = Callable[[], Tensor]


class SparseLatentLayer(LatentLayer):
    """Latents of the tokens that a policy keeps.

    A slot holds one token of every token group (heads whose key and value groups have no head in common with others),
    which may be different tokens; each has its position. Rows that keep fewer tokens than others have slots without any
    in front, at position -1. Up to the first drop the layer holds what a `LatentLayer` does.

    Args:
        policy: decides how many tokens stay, and which.
        layer, num_layers: which decoder layer this is, of how many.
        widths: of every token group, the widths of its key and of its value latents.
        sliding_window, max_length, quantization: as of `LatentLayer`.
    """

    is_croppable = False

    def __init__(
        self,
        policy: TokenPolicy,
        layer: int,
        num_layers: int,
        widths: Sequence[tuple[int, int]],
        sliding_window: int | None,
        max_length: int | None,
        quantization: LayerQuantization,
    ) -> None:
        super().__init__(None, sliding_window, max_length, quantization)
        self.policy, self.place = policy, (layer, num_layers)
        self.widths = [list(sizes) for sizes in zip(*widths, strict=True)]
        self.token_groups = len(widths)
        self._forget_rows()

    def _forget_rows(self) -> None:
        """No rows yet. Of each, on the host, where they decide what is due: tokens seen and tokens held."""
        self.seen: list[int] = []
        self.tokens: list[int] = []
        self.has_gaps = self.has_dropped = False

    @property
    def held(self) -> int:
        """Slots that are held."""
        return len(self.key_buffer)

    @property
    def positions(self) -> Tensor:
        """Positions of what the last `update` returned, int32 [batch, length], by token group once these differ."""
        positions = self.visible_positions.clamp(min=0)
        return positions if self.has_dropped and self.token_groups > 1 else positions[..., 0]

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        position_ids: Tensor,
        token_mask: Tensor | None = None,
        *args,
        **kwargs,
    ) -> tuple[Latents, Latents]:
        """Append latents as `LatentLayer.update`.

        Args:
            token_mask: which of the new tokens are none but padding, bool [batch, new]; all are tokens if None.
        """
        batch, new, _ = key_states.shape
        arrived = [new] * batch
        if token_mask is not None:
            arrived = token_mask.sum(dim=1).tolist()
            position_ids = position_ids.expand(batch, -1).masked_fill(~token_mask, NOWHERE)
        latents = super().update(key_states, value_states, position_ids)
        before = zip(self.seen or [0] * batch, self.tokens or [0] * batch, arrived, strict=True)
        counts = [(seen + more, min(held + more, self.held)) for seen, held, more in before]
        self.seen, self.tokens = map(list, zip(*counts, strict=True))
        self.has_gaps = min(self.tokens) < self.held
        return latents

    def _seen_positions(self, visible: int) -> Tensor:
        return self.position_buffer.last(visible)

    def visible(self, queries: int) -> Tensor | None:
        """What the newest `queries` tokens may attend to; None: all up to one's own.

        bool [batch, 1 or token groups, queries, length].
        """
        if queries == 1 and not self.has_gaps and not self.is_sliding:
            return None
        groups = self.token_groups if self.is_sliding else 1
        positions = self.visible_positions[..., :groups].transpose(1, 2)
        slots = torch.arange(positions.shape[2], device=positions.device)
        own, valid = slots[-queries:, None], positions >= 0
        mask = (slots <= own) & valid[:, :, None] & valid[:, :, -queries:, None]
        if self.is_sliding:
            mask = mask & (positions[:, :, -queries:, None] - positions[:, :, None] < self.sliding_window)
        # Padding sees itself, so that no row of a softmax is empty.
        return mask | (slots == own)

    def _targets(self, new: int) -> list[int]:
        """Tokens that each row is to hold after `new` have come; fewer than it does where it is due."""
        skipped = self.policy.settings.skip_prefill_compression if new > 1 else not self.policy.decodes
        if skipped:
            return self.tokens
        slack = 0 if new > 1 else self.policy.settings.window_size
        kept = [self.policy.kept(*self.place, seen) for seen in self.seen]
        return [less if held > less + slack else held for held, less in zip(self.tokens, kept, strict=True)]

    def is_due(self, new: int) -> bool:
        """Whether tokens are to be dropped after `new` have come."""
        return self._targets(new) != self.tokens

    def drop(self, votes: Votes, new: int) -> None:
        """Bring the rows that are due after `new` tokens down to their budgets, in every token group."""
        before, settings = self.held, self.policy.settings
        self.tokens = self._targets(new)
        positions = self.position_buffer.tokens
        # Rows hold as many tokens of one group as of another, behind slots without any.
        tokens, counts = Tokens.of(positions[..., 0] >= 0, settings), torch.tensor(self.tokens, device=positions.device)
        scores = [self.policy.score(each, tokens.places) for each in self._votes(votes, tokens)]
        most = max(self.tokens)
        if settings.pool_type is None:
            chosen = [best_tokens(each, tokens, counts, most) for each in scores]
            self._select(torch.stack([slots for slots, _ in chosen], dim=2), chosen[0][1])
        else:
            self._merge(scores, Windows.of(tokens, counts, most, settings))
        self.max_length = None if self.max_length is None else self.max_length - (before - self.held)
        self.has_gaps, self.has_dropped = min(self.tokens) < most, True

    def _votes(self, votes: Votes, tokens: Tokens) -> list[Tensor | None]:
        """Each token group's, of what is still in the sliding window; the newest, which stay in any case, have none."""
        if not self.policy.needs_votes:
            return [None] * self.token_groups
        newest = tokens.behind <= self.policy.settings.window_size
        return [each[:, -newest.shape[1] :].masked_fill(newest, 0) for each in votes().unbind(1)]

    def _select(self, slots: Tensor, kept: Tensor) -> None:
        """Keep the tokens in `slots` [batch, count, token groups] where `kept` [batch, count] says so."""
        widths = [*self.widths, [1] * self.token_groups]
        for buffer, sizes in zip((self.key_buffer, self.value_buffer, self.position_buffer), widths, strict=True):
            buffer.take(slots, sizes)
        self.position_buffer.put(~kept, torch.full_like(self.position_buffer.tokens, NOWHERE))

    def _merge(self, scores: list[Tensor], windows: Windows) -> None:
        """Every window of tokens becomes one; what is alone in its window stays as it is."""
        merged, pool_type = windows.sizes > 1, self.policy.settings.pool_type
        pooled = {} if pool_type == "best" else self._pooled(scores, windows)
        slots = torch.stack([windows.representatives(each) for each in scores], dim=2)
        self._select(slots, windows.sizes > 0)
        for buffer, tokens in pooled.items():
            buffer.put(merged, tokens)

    def _pooled(self, scores: list[Tensor], windows: Windows) -> dict:
        """Of every buffer, the mean or maximum of every window; of positions the mean, weighed by the scores."""
        by_group = zip(self.position_buffer.tokens.unbind(2), scores, strict=True)
        pooled = {self.position_buffer: torch.stack(list(starmap(windows.mean_positions, by_group)), dim=2)}
        for buffer in (self.key_buffer, self.value_buffer):
            latents = dense(buffer.last(len(buffer)), torch.float32)
            if self.policy.settings.pool_type == "mean":
                tokens = windows.total(latents) / windows.sizes.clamp(min=1)[..., None]
            else:
                tokens = windows.largest(latents).masked_fill(windows.sizes[..., None] == 0, 0)
            pooled[buffer] = tokens.to(self.dtype)
        return pooled

    def check_dropped(self, new: int) -> None:
        """Refuse to go on with tokens that should have been dropped after `new` had come.

        Raises:
            PaluError: with both numbers.
        """
        targets = self._targets(new)
        if targets != self.tokens:
            raise PaluError(
                f"layer {self.place[0]} holds {self.held} tokens after prefill, {self.policy.settings.method} leaves "
                f"{max(targets)}: the model's attention did not drop them"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Tokens that were dropped cannot come back."""
        raise RuntimeError(
            "a cache that drops tokens cannot be cropped (assisted decoding); use no token_sparse_method"
        )

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._forget_rows()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        super().batch_select_indices(indices)
        rows = torch.arange(len(self.seen))[indices.cpu()].tolist()
        self.seen, self.tokens = [self.seen[row] for row in rows], [self.tokens[row] for row in rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.seen = [seen for seen in self.seen for _ in range(repeats)]
        self.tokens = [held for held in self.tokens for _ in range(repeats)]
