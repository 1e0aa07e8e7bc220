"""One layer of the latent cache: key latents before RoPE, value latents, each token's position."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from palu.core.errors import PaluError
from palu.kernels.latents import Latents
from palu.kernels.quantize import Quantization
from palu.nn.packed_buffer import MixedBuffer, PackedBuffer
from palu.nn.token_buffer import TokenBuffer

Buffer = TokenBuffer | PackedBuffer | MixedBuffer


class LayerQuantization(NamedTuple):
    """How one layer's keys and values become codes; None keeps them as they are.

    sinks, window: how many of the first and of the newest tokens stay as they are.
    """

    key: Quantization | None
    value: Quantization | None
    sinks: int = 0
    window: int = 0

    def new_buffer(self, quantization: Quantization | None) -> Buffer:
        """An empty buffer for one side."""
        if quantization is None:
            return TokenBuffer()
        if self.sinks == self.window == 0:
            return PackedBuffer(quantization)
        return MixedBuffer(quantization, self.sinks, self.window)


UNQUANTIZED = LayerQuantization(None, None)


class LatentLayer(CacheLayerMixin):
    """A growing cache layer; with a sliding window it keeps the last `sliding_window - 1` tokens.

    Latents are [batch, length, sum(ranks)]; positions are int32 [batch, length], one per row because rows are padded
    differently. Layers that keep the same tokens share the positions: the first of them, the leader, holds them.

    Args:
        leader: the layer that holds this layer's positions, or None if it holds its own.
        sliding_window: tokens that a query sees, itself included; None for full attention.
        max_length: length that the cache is known never to exceed; bounds the growth by doubling.
        quantization: how keys and values become codes, where they do.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    keeps_positions = True
    # Groups of heads that may come to hold different tokens.
    token_groups = 1

    def __init__(
        self,
        leader: Optional["LatentLayer"] = None,
        sliding_window: int | None = None,
        max_length: int | None = None,
        quantization: LayerQuantization = UNQUANTIZED,
    ) -> None:
        super().__init__()
        self.leader = leader
        self.holds_positions = leader is None and self.keeps_positions
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.max_length = max_length
        self.record_past = False
        self.cumulative_length = 0
        self.key_buffer = quantization.new_buffer(quantization.key)
        self.value_buffer = quantization.new_buffer(quantization.value)
        self.position_buffer = TokenBuffer()
        self.visible_positions: Tensor | None = None
        self.filled: int | Tensor = 0

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The buffers that this layer itself holds."""
        own = (self.key_buffer, self.value_buffer)
        return own if not self.holds_positions else (*own, self.position_buffer)

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens that the last `update` returned, int32 [batch, length]."""
        return self.visible_positions if self.leader is None else self.leader.positions

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype, device and batch size of the first latents."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, position_ids: Tensor, *args, **kwargs
    ) -> tuple[Latents, Latents]:
        """Append latents [batch, new, sum(ranks)] with their positions [batch or 1, new].

        Returns:
            The key and value latents that the new tokens may attend to. `positions` are theirs; the first `filled` of
            them are tokens, the new ones last (a fixed layer returns its unwritten room too).
        """
        self._check_rows(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[1]
        self.cumulative_length += new
        self.key_buffer.append(key_states, self.max_length)
        self.value_buffer.append(value_states, self.max_length)
        if self.holds_positions:
            positions = position_ids.to(torch.int32).expand(key_states.shape[0], -1)
            self.position_buffer.append(positions[..., None].expand(-1, -1, self.token_groups), self.max_length)
        visible = len(self.key_buffer)
        if self.is_sliding:
            visible = min(visible, self.sliding_window - 1 + new)
        if self.holds_positions:
            self.visible_positions = self._seen_positions(visible)
        keys, values = self.key_buffer.last(visible), self.value_buffer.last(visible)
        self.filled = visible
        if not self.record_past:
            self._restrict_to_window()
        return keys, values

    def _seen_positions(self, visible: int) -> Tensor:
        """Positions of the newest tokens, [batch, visible], and by token group where these differ."""
        return self.position_buffer.last(visible)[..., 0]

    def _check_rows(self, key_states: Tensor) -> None:
        rows = self.batch_size
        if rows not in (-1, key_states.shape[0]):
            raise PaluError(f"the latent cache holds {rows} rows, the new tokens have {key_states.shape[0]}")

    def _restrict_to_window(self) -> None:
        if self.is_sliding:
            for buffer in self.buffers:
                buffer.drop_front(max(0, len(buffer) - self.sliding_window + 1))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next `update` of `query_length` tokens returns."""
        if not self.is_sliding:
            return self.cumulative_length + query_length, 0
        seen = min(self.cumulative_length, self.sliding_window - 1)
        return seen + query_length, self.cumulative_length - seen

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The sliding window, or -1: no maximum."""
        return self.sliding_window if self.is_sliding else -1

    def activate_past_recording(self) -> None:
        """Keep tokens that slide out of the window until the next `crop`, so that it can bring them back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; the argument is zero or negative, as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes zero or a negative number of tokens, got {tokens_to_remove}")
        past_window = self.is_sliding and self.cumulative_length >= self.sliding_window
        if past_window and not self.record_past and tokens_to_remove < 0:
            raise RuntimeError("call activate_past_recording before the window is full to be able to crop the cache")
        for buffer in self.buffers:
            buffer.drop_back(-tokens_to_remove)
        self.cumulative_length = max(0, self.cumulative_length + tokens_to_remove)
        self._restrict_to_window()

    def reset(self) -> None:
        """Forget all tokens."""
        for buffer in self.buffers:
            buffer.clear()
        self.cumulative_length = 0
        self.visible_positions = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        for buffer in self.buffers:
            buffer.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        for buffer in self.buffers:
            buffer.repeat_rows(repeats)

    def offload(self) -> None:
        """Move the latents to the CPU."""
        for buffer in self.buffers:
            buffer.move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move the latents back to the device that they came from."""
        if self.is_initialized:
            for buffer in self.buffers:
                buffer.move(self.device)

    def nbytes(self) -> int:
        """Bytes of the held latents and positions."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def allocated_nbytes(self) -> int:
        """Bytes of memory behind them, the room to grow included."""
        return sum(buffer.allocated_nbytes for buffer in self.buffers)

    @property
    def batch_size(self) -> int:
        """Rows of the cache, -1 before the first update."""
        return self.key_buffer.rows
