"""A cache layer that keeps only some tokens: every token group its own, as a policy says."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palu.core.errors import PaluError
from palu.kernels.latents import Latents, dense
from palu.nn.latent_layer import HeldTokens, LatentLayer, LayerQuantization
from palu.sparse.base import TokenPolicy
from palu.sparse.keep import Tokens, Windows, best_tokens

# Position of a slot without a token.
NOWHERE = -1
# Gives the attention that the newest queries pay to a token group's tokens, float32 [batch, length].
Votes = Callable[[int], Tensor]


class SparseLatentLayer(LatentLayer):
    """Latents of the tokens that a policy keeps.

    Every token group (heads whose key and value groups have no head in common with others') is a growing cache of its
    own, whose positions are -1 where a row has no token. Up to the first drop it holds what a `LatentLayer` does.

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
        self.widths = [list(sizes) for sizes in zip(*widths, strict=True)]
        self.groups = [
            LatentLayer(None, sliding_window, max_length, codes) for codes in quantization.split(*self.widths)
        ]
        super().__init__(None, sliding_window, max_length)
        self.policy, self.place = policy, (layer, num_layers)
        self._forget_rows()

    def _forget_rows(self) -> None:
        """No rows yet. Of each, on the host, where they decide what is due: tokens seen and tokens held."""
        self.seen: list[int] = []
        self.tokens: list[int] = []
        self.has_gaps = self.has_dropped = False

    @property
    def buffers(self) -> tuple:
        """The buffers of all token groups."""
        return tuple(buffer for group in self.groups for buffer in group.buffers)

    @property
    def batch_size(self) -> int:
        """Rows of the cache, -1 before the first update."""
        return self.groups[0].batch_size

    @property
    def held(self) -> int:
        """Slots of every token group."""
        return len(self.groups[0].key_buffer)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        position_ids: Tensor,
        token_mask: Tensor | None = None,
        *args,
        **kwargs,
    ) -> tuple[list[Latents], list[Latents]]:
        """Append latents as `LatentLayer.update`; returns each token group's.

        Args:
            token_mask: which of the new tokens are none but padding, bool [batch, new]; all are tokens if None.
        """
        self._check_rows(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, new, _ = key_states.shape
        positions = position_ids.expand(batch, -1)
        arrived = [new] * batch if token_mask is None else token_mask.sum(dim=1).tolist()
        if token_mask is not None:
            positions = positions.masked_fill(~token_mask, NOWHERE)
        self.cumulative_length += new
        keys, values = key_states.split(self.widths[0], dim=-1), value_states.split(self.widths[1], dim=-1)
        updated = [group.update(*parts, positions) for group, *parts in zip(self.groups, keys, values, strict=True)]
        before = zip(self.seen or [0] * batch, self.tokens or [0] * batch, arrived, strict=True)
        counts = [(seen + more, min(held + more, self.held)) for seen, held, more in before]
        self.seen, self.tokens = map(list, zip(*counts, strict=True))
        self.has_gaps = min(self.tokens) < self.held
        return [keys for keys, _ in updated], [values for _, values in updated]

    def by_group(self, keys: list[Latents], values: list[Latents]) -> list[HeldTokens]:
        """What `update` returned with every token group's positions."""
        return [
            HeldTokens(key, value, group.positions.clamp(min=0), key.shape[1], shared=False)
            for key, value, group in zip(keys, values, self.groups, strict=True)
        ]

    def visible(self, group: int, queries: int) -> Tensor | None:
        """What the newest `queries` tokens may attend to, bool [batch, 1, queries, length]; None: all of one's."""
        if queries == 1 and not self.has_gaps and not self.is_sliding:
            return None
        positions = self.groups[group].positions
        slots = torch.arange(positions.shape[1], device=positions.device)
        own = slots[-queries:, None]
        valid = positions >= 0
        mask = (slots <= own) & valid[:, None] & valid[:, -queries:, None]
        if self.is_sliding:
            mask = mask & (positions[:, -queries:, None] - positions[:, None] < self.sliding_window)
        # Padding sees itself, so that no row of a softmax is empty.
        return (mask | (slots == own))[:, None]

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
        most = max(self.tokens)
        for index, group in enumerate(self.groups):
            positions = group.position_buffer.tokens[..., 0]
            tokens, counts = Tokens.of(positions >= 0, settings), torch.tensor(self.tokens, device=positions.device)
            scores = self.policy.score(self._votes(votes, index, tokens), tokens.places)
            if settings.pool_type is None:
                _select(group, *best_tokens(scores, tokens, counts, most))
            else:
                windows = Windows.of(tokens, counts, most, settings)
                _merge(group, scores, windows, settings.pool_type)
            group.max_length = None if group.max_length is None else group.max_length - (before - self.held)
        self.has_gaps, self.has_dropped = min(self.tokens) < most, True

    def _votes(self, votes: Votes, group: int, tokens: Tokens) -> Tensor | None:
        """For the tokens that are still in the sliding window; the newest ones, which stay in any case, have none."""
        if not self.policy.needs_votes:
            return None
        newest = tokens.behind <= self.policy.settings.window_size
        return votes(group)[:, -newest.shape[1] :].masked_fill(newest, 0)

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


def _select(group: LatentLayer, slots: Tensor, kept: Tensor) -> None:
    """Keep the tokens in `slots` [batch, count] where `kept` says so."""
    for buffer in group.buffers:
        buffer.take(slots)
    positions = group.position_buffer
    positions.put(~kept, torch.full_like(positions.tokens, NOWHERE))


def _merge(group: LatentLayer, scores: Tensor, windows: Windows, pool_type: str) -> None:
    """Every window of tokens becomes one; what is alone in its window stays as it is."""
    merged = windows.sizes > 1
    pooled = {} if pool_type == "best" else _pooled(group, scores, windows, pool_type)
    _select(group, windows.representatives(scores), windows.sizes > 0)
    for buffer, tokens in pooled.items():
        buffer.put(merged, tokens)


def _pooled(group: LatentLayer, scores: Tensor, windows: Windows, pool_type: str) -> dict:
    """Of every buffer, the mean or maximum of every window; of positions the mean, weighed by the scores."""
    positions = group.position_buffer.tokens[..., 0]
    pooled = {group.position_buffer: windows.mean_positions(positions, scores)[..., None]}
    for buffer in (group.key_buffer, group.value_buffer):
        latents = dense(buffer.last(len(buffer)), torch.float32)
        if pool_type == "mean":
            tokens = windows.total(latents) / windows.sizes.clamp(min=1)[..., None]
        else:
            tokens = windows.largest(latents).masked_fill(windows.sizes[..., None] == 0, 0)
        pooled[buffer] = tokens.to(group.dtype)
    return pooled
