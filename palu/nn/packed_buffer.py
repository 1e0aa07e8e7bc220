"""A token buffer that holds latents as packed codes."""

import torch
from torch import Tensor

from palu.kernels.quantize import PackedLatents, Quantization, quantize
from palu.nn.token_buffer import TokenBuffer


class PackedBuffer:
    """As `TokenBuffer`, but tokens are quantised as they come and handed out as `PackedLatents`.

    Codes, scales and zero points lie in a buffer each, so that growing, cropping and selecting rows is theirs.
    """

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization
        self.parts = [TokenBuffer() for _ in range(2 if quantization.symmetric else 3)]

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def storage(self) -> Tensor | None:
        """The codes' storage; None before the first token."""
        return self.parts[0].storage

    @property
    def tokens(self) -> PackedLatents:
        """All held tokens."""
        return self.last(len(self))

    def last(self, count: int) -> PackedLatents:
        """The newest `count` tokens, as views."""
        return self.as_latents([part.last(count) for part in self.parts])

    def as_latents(self, tensors: list[Tensor]) -> PackedLatents:
        """Codes, scales and zero points (if stored) as one value."""
        codes, scales, zeros = (*tensors, None)[:3]
        return PackedLatents(codes, scales, zeros, self.quantization)

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """Codes, scales and zero points (if stored) of latents [batch, new, width]."""
        packed = quantize(tokens, self.quantization)
        return [tensor for tensor in (packed.codes, packed.scales, packed.zeros) if tensor is not None]

    def append(self, tokens: Tensor, max_length: int | None = None) -> None:
        """Quantise latents [batch, new, width] and add them at the back."""
        for part, tensor in zip(self.parts, self.encode(tokens), strict=True):
            part.append(tensor, max_length)

    def drop_front(self, count: int) -> None:
        """Forget the `count` oldest tokens."""
        for part in self.parts:
            part.drop_front(count)

    def drop_back(self, count: int) -> None:
        """Forget the `count` newest tokens."""
        for part in self.parts:
            part.drop_back(count)

    def select_rows(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows of the batch."""
        for part in self.parts:
            part.select_rows(rows)

    def repeat_rows(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        for part in self.parts:
            part.repeat_rows(repeats)

    def move(self, device: torch.device) -> None:
        """Move everything to another device."""
        for part in self.parts:
            part.move(device)

    def clear(self) -> None:
        """Forget everything and free the memory."""
        for part in self.parts:
            part.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the held codes, scales and zero points."""
        return sum(part.nbytes for part in self.parts)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of memory behind them."""
        return sum(part.allocated_nbytes for part in self.parts)
