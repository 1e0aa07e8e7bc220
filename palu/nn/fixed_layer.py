"""A cache layer of fixed capacity, for CUDA graphs and compiled models."""

import functools
from typing import Optional

import torch
from torch import Tensor

from palu.core.errors import PaluError
from palu.kernels.latents import Latents
from palu.nn.latent_layer import UNQUANTIZED, LatentLayer, LayerQuantization
from palu.nn.packed_buffer import MixedBuffer, PackedBuffer
from palu.nn.token_buffer import TokenBuffer

FixedBuffer = TokenBuffer | PackedBuffer


class FixedLatentLayer(LatentLayer):
    """A layer of fixed capacity, allocated once: its tensors never move, so CUDA graphs and torch.compile can use it.

    `update` returns the whole storage; the attention mask hides what is not written yet. With a sliding window the
    storage holds the window and rolls.

    Args:
        capacity: tokens that the whole cache must be able to hold.
    """

    is_compileable = True
    is_croppable = False

    def __init__(
        self,
        capacity: int,
        leader: Optional["FixedLatentLayer"] = None,
        sliding_window: int | None = None,
        quantization: LayerQuantization = UNQUANTIZED,
    ) -> None:
        if capacity < 1:
            raise PaluError(f"the capacity of a latent cache must be at least 1, not {capacity}")
        super().__init__(leader, sliding_window, capacity, quantization)
        if any(isinstance(buffer, MixedBuffer) for buffer in (self.key_buffer, self.value_buffer)):
            raise PaluError(
                "lt_window and lt_sinks need a growing cache; a cache of fixed capacity keeps all tokens as codes"
            )
        self.capacity = capacity if sliding_window is None else min(capacity, sliding_window)
        self.written = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything."""
        super().lazy_initialization(key_states, value_states)
        batch = key_states.shape[0]
        examples = [(self.key_buffer, key_states), (self.value_buffer, value_states)]
        if self.holds_positions:
            examples.append((self.position_buffer, key_states.new_zeros(batch, 1, 1, dtype=torch.int32)))
        for buffer, example in examples:
            for part, tensor in zip(buffer.parts, buffer.encode(example[:, :1]), strict=True):
                part.storage = tensor.new_zeros(batch, self.capacity, tensor.shape[2])
        self.written = self.written.to(key_states.device)
        if not torch.compiler.is_compiling():
            for part in self.parts:
                torch._dynamo.mark_static_address(part.storage)
            torch._dynamo.mark_static_address(self.written)

    def update(
        self, key_states: Tensor, value_states: Tensor, position_ids: Tensor, *args, **kwargs
    ) -> tuple[Latents, Latents]:
        """Write latents behind the ones held; see `LatentLayer.update`."""
        self._check_rows(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[1]
        rolls = self.is_sliding and self.cumulative_length + new > self.capacity
        if not self.is_sliding and not torch.compiler.is_compiling() and self.cumulative_length + new > self.capacity:
            raise PaluError(
                f"the latent cache has a fixed capacity of {self.capacity} tokens, "
                f"{self.cumulative_length + new} are needed"
            )
        write = self._roll if rolls else functools.partial(self._write, self._slots(new))
        keys, values = write(self.key_buffer, key_states), write(self.value_buffer, value_states)
        if self.holds_positions:
            positions = position_ids.to(torch.int32).expand(key_states.shape[0], -1)[..., None]
            self.visible_positions = write(self.position_buffer, positions)[..., 0]
        if not rolls:
            self.written.add_(new)
        self.cumulative_length += new
        self.filled = min(self.cumulative_length, keys.shape[1]) if self.is_sliding else self.written
        return keys, values

    @property
    def parts(self) -> list[TokenBuffer]:
        """Every tensor that this layer holds."""
        return [part for buffer in self.buffers for part in buffer.parts]

    def _slots(self, new: int) -> Tensor:
        """Where the new tokens go; of one without a launch."""
        return self.written[None] if new == 1 else torch.arange(new, device=self.written.device) + self.written

    def _write(self, slots: Tensor, buffer: FixedBuffer, tokens: Tensor) -> Latents:
        buffer.write_at(slots, tokens)
        return buffer.as_latents([part.storage for part in buffer.parts])

    def _roll(self, buffer: FixedBuffer, tokens: Tensor) -> Latents:
        held = min(self.cumulative_length, self.capacity)
        seen = []
        for part, tensor in zip(buffer.parts, buffer.encode(tokens), strict=True):
            full = torch.cat([part.storage[:, max(0, held - self.capacity + 1) : held], tensor], dim=1)
            part.storage.copy_(full[:, -self.capacity :])
            seen.append(part.storage if full.shape[1] == self.capacity else full)
        return buffer.as_latents(seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next `update` of `query_length` tokens returns."""
        if not self.is_sliding or self.cumulative_length + query_length <= self.capacity:
            return self.capacity, 0
        seen = min(self.cumulative_length, self.capacity - 1)
        return seen + query_length, self.cumulative_length - seen

    def get_seq_length(self) -> int | Tensor:
        """Tokens seen so far: a tensor for a full layer, so that a compiled graph does not depend on the number."""
        return self.cumulative_length if self.is_sliding or not self.is_initialized else self.written

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity

    def crop(self, tokens_to_remove: int) -> None:
        """A fixed cache cannot be cropped (nor can transformers' StaticCache)."""
        raise RuntimeError("a latent cache of fixed capacity cannot be cropped; use the growing one")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`; in place where their number stays, so that the tensors do not move."""
        for part in self.parts:
            if part.storage is not None and len(indices) == part.storage.shape[0] and indices.dtype != torch.bool:
                part.storage.copy_(part.storage[indices.to(part.storage.device)])
            else:
                part.select_rows(indices)

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        for part in self.parts:
            if part.storage is not None:
                part.storage.zero_()
        self.written.zero_()
        self.cumulative_length = 0

    def nbytes(self) -> int:
        """Bytes of the held latents and positions."""
        held = min(self.cumulative_length, self.capacity)
        return self.allocated_nbytes() * held // self.capacity
