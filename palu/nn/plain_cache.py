"""A stock model's cache with quantised full keys and values: what latents are compared with at equal bytes."""

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from palu.config import head_dim
from palu.core.errors import PaluError
from palu.core.validate import require
from palu.kernels.latents import dense
from palu.kernels.packing import PLANES
from palu.kernels.quantize import Quantization
from palu.nn.buffer_group import BufferGroup
from palu.nn.latent_cache import cache_bytes_per_token, cache_nbytes, layer_window
from palu.nn.latent_layer import LatentLayer, LayerQuantization
from palu.nn.packed_buffer import PackedBuffer
from palu.nn.token_buffer import TokenBuffer

KeyAxis = Literal["token", "channel"]
KEY_AXES: tuple[KeyAxis, ...] = ("token", "channel")
# Tokens that share a channel's scale, as in KIVI (arXiv 2402.02750).
CHANNEL_BLOCK = 32


class ChannelBuffer(BufferGroup):
    """Tokens in blocks, each channel of a block with a scale of its own; those that fill no block yet as they are."""

    def __init__(self, bits: int, channels: int) -> None:
        self.blocks = PackedBuffer(Quantization(bits, (CHANNEL_BLOCK,) * channels, fine_zeros=True))
        self.newest = TokenBuffer()
        self.skipped = 0
        super().__init__([self.blocks, self.newest])

    def __len__(self) -> int:
        return len(self.blocks) * CHANNEL_BLOCK + len(self.newest) - self.skipped

    def append(self, tokens: Tensor, max_length: int | None = None) -> None:
        """Add [batch, new, channels] at the back and quantise whole blocks."""
        self.newest.append(tokens)
        whole = len(self.newest) // CHANNEL_BLOCK * CHANNEL_BLOCK
        if whole:
            blocks = self.newest.tokens[:, :whole].unflatten(1, (-1, CHANNEL_BLOCK))
            self.blocks.append(blocks.transpose(2, 3).flatten(2))
            self.newest.drop_front(whole)

    def last(self, count: int) -> Tensor:
        """The newest `count` tokens as numbers, [batch, count, channels]."""
        dtype = self.newest.storage.dtype
        parts = [self.newest.tokens]
        if len(self.blocks):
            channels = len(self.blocks.quantization.widths)
            blocks = self.blocks.last(len(self.blocks)).dequantized(dtype)
            parts.insert(0, blocks.unflatten(2, (channels, CHANNEL_BLOCK)).transpose(2, 3).flatten(1, 2))
        return torch.cat(parts, dim=1)[:, -count:]

    def drop_front(self, count: int) -> None:
        """Forget the `count` oldest tokens; a block goes when all of it is forgotten."""
        self.skipped += count
        gone = min(self.skipped // CHANNEL_BLOCK, len(self.blocks))
        self.blocks.drop_front(gone)
        self.skipped -= gone * CHANNEL_BLOCK
        if not len(self.blocks):
            self.newest.drop_front(self.skipped)
            self.skipped = 0

    def drop_back(self, count: int) -> None:
        """Forget the `count` newest tokens.

        Raises:
            PaluError: if some of them are in a block already.
        """
        if count > len(self.newest):
            raise PaluError("a cache with codes per channel cannot be cropped into a whole block of tokens")
        self.newest.drop_back(count)

    def clear(self) -> None:
        """Forget everything and free the memory."""
        super().clear()
        self.skipped = 0


class PlainQuantizedLayer(LatentLayer):
    """Full keys and values as codes: values per token and head, keys too or per channel over blocks of tokens.

    What `update` returns is read back from the codes.
    """

    keeps_positions = False

    def __init__(self, bits: int, kv_heads: int, head_size: int, key_axis: KeyAxis, sliding_window: int | None) -> None:
        by_head = Quantization(bits, (head_size,) * kv_heads, fine_zeros=True)
        super().__init__(None, sliding_window, quantization=LayerQuantization(by_head, by_head))
        self.head_size = head_size
        if key_axis == "channel":
            self.key_buffer = ChannelBuffer(bits, kv_heads * head_size)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append [batch, kv_heads, new, head_dim]; returns all that the new tokens may attend to, dequantised."""
        flat = (states.transpose(1, 2).flatten(2) for states in (key_states, value_states))
        kept = super().update(*flat, position_ids=None)
        return tuple(
            dense(tokens, key_states.dtype).unflatten(2, (-1, self.head_size)).transpose(1, 2) for tokens in kept
        )


class PlainQuantizedCache(Cache):
    """The peer of latents: a stock model's keys (after RoPE) and values as 2, 3, 4 or 8-bit codes.

    Args:
        config: the stock model's config.
        bits: of a code.
        key_axis: `token`: one scale and zero point per token and head, as for values; `channel`: per channel over 32
            tokens (KIVI).

    Raises:
        PaluError: if bits or axis are unknown.
    """

    def __init__(self, config: PreTrainedConfig, bits: int, key_axis: KeyAxis = "token") -> None:
        require(bits in PLANES, f"plain bits {bits!r} must be one of {', '.join(map(str, PLANES))}")
        require(
            getattr(config, "num_key_value_heads", None) is not None,
            f"{config.model_type!r} models are not supported by plain quantisation: no num_key_value_heads",
        )
        require(key_axis in KEY_AXES, f"key axis {key_axis!r} must be one of {', '.join(KEY_AXES)}")
        layers = [
            PlainQuantizedLayer(
                bits, config.num_key_value_heads, head_dim(config), key_axis, layer_window(config, layer)
            )
            for layer in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)

    def nbytes(self) -> int:
        """Bytes of the held codes, scales and zero points."""
        return cache_nbytes(self)

    def bytes_per_token(self) -> float:
        """Held bytes per cached token of one row."""
        return cache_bytes_per_token(self)
