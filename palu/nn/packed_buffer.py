"""Token buffers that hold latents as packed codes: all of them, or all but the first and the newest tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palu.kernels.latents import Latents, MixedLatents
from palu.kernels.packing import pack, unpack
from palu.kernels.quantize import PackedLatents, Quantization, encode, encode_into
from palu.nn.buffer_group import BufferGroup
from palu.nn.token_buffer import TokenBuffer, taken


class PackedBuffer(BufferGroup):
    """As `TokenBuffer`, but tokens are quantised as they come and handed out as `PackedLatents`.

    Codes lie in one buffer, scales and zero points in another, so that growing, cropping and selecting rows is theirs.
    """

    def __init__(self, quantization: Quantization) -> None:
        super().__init__([TokenBuffer(), TokenBuffer()])
        self.quantization = quantization

    def __len__(self) -> int:
        return len(self.members[0])

    def last(self, count: int) -> PackedLatents:
        """The newest `count` tokens, as views."""
        return self.as_latents([part.last(count) for part in self.members])

    def as_latents(self, tensors: list[Tensor]) -> PackedLatents:
        """Codes and parameters as one value."""
        return PackedLatents.of(*tensors, self.quantization)

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """Codes and parameters of latents [batch, new, width]."""
        return list(encode(tokens, self.quantization))

    def write_at(self, slots: Tensor, tokens: Tensor) -> None:
        """Quantise latents [batch, new, width] into slots [new] of storage of fixed size."""
        encode_into(*(part.storage for part in self.members), tokens, self.quantization, slots)

    def append(self, tokens: Tensor, max_length: int | None = None) -> None:
        """Quantise latents [batch, new, width] and add them at the back."""
        (codes, parameters), kind = self.members, self.quantization
        room = codes.room(tokens, kind.packed_width, torch.uint8, max_length)
        encode_into(room, parameters.room(tokens, kind.parameter_count, torch.float16, max_length), tokens, kind)
        for part in self.members:
            part.stop += tokens.shape[1]

    def take(self, slots: Tensor, widths: Sequence[int]) -> None:
        """As of `TokenBuffer`, of latents as wide as `widths` say; the codes stay what they are."""
        codes, parameters = self.members
        bits, parts = self.quantization.bits, self.quantization.split(widths)
        parameters.take(slots, [part.parameter_count for part in parts])
        unpacked = unpack(codes.tokens, self.quantization.width, bits)
        codes.storage, codes.start, codes.stop = pack(taken(unpacked, slots, widths), bits), 0, slots.shape[1]

    def put(self, where: Tensor, tokens: Tensor) -> None:
        """Replace the held tokens by latents [batch, held, width] where a mask [batch, held] says so."""
        for part, tensor in zip(self.members, self.encode(tokens), strict=True):
            part.put(where, tensor)

    def drop_front(self, count: int) -> None:
        """Forget the `count` oldest tokens."""
        for part in self.members:
            part.drop_front(count)

    def drop_back(self, count: int) -> None:
        """Forget the `count` newest tokens."""
        for part in self.members:
            part.drop_back(count)


class MixedBuffer(BufferGroup):
    """Tokens as packed codes, but the first `sinks` and the newest `window` of them as they are.

    A token is quantised when `window` newer ones have come; what is quantised stays so when newer tokens are dropped.
    """

    def __init__(self, quantization: Quantization, sinks: int, window: int) -> None:
        self.first, self.packed, self.newest = TokenBuffer(), PackedBuffer(quantization), TokenBuffer()
        super().__init__([self.first, self.packed, self.newest])
        self.sinks, self.window = sinks, window
        self.seen = 0

    def __len__(self) -> int:
        return sum(len(member) for member in self.members)

    def last(self, count: int) -> Latents:
        """The newest `count` tokens, as views."""
        stretches = []
        for member in reversed(self.members):
            taken = min(count, len(member))
            if taken:
                stretches.insert(0, member.last(taken))
            count -= taken
        return stretches[0] if len(stretches) == 1 else MixedLatents(tuple(stretches))

    def append(self, tokens: Tensor, max_length: int | None = None) -> None:
        """Add latents [batch, new, width] at the back, and quantise those that are no longer among the newest."""
        sinks = max(0, min(self.sinks - self.seen, tokens.shape[1]))
        self.seen += tokens.shape[1]
        if sinks:
            self.first.append(tokens[:, :sinks], self.sinks)
        tokens = tokens[:, sinks:]
        aged = max(0, len(self.newest) + tokens.shape[1] - self.window)
        held = min(aged, len(self.newest))
        if held:
            self.packed.append(self.newest.tokens[:, :held], max_length)
            self.newest.drop_front(held)
        if aged > held:
            self.packed.append(tokens[:, : aged - held], max_length)
        if tokens.shape[1] > aged - held:
            self.newest.append(tokens[:, aged - held :])

    def drop_front(self, count: int) -> None:
        """Forget the `count` oldest tokens."""
        self._drop(self.members, "drop_front", count)

    def drop_back(self, count: int) -> None:
        """Forget the `count` newest tokens."""
        self.seen = max(0, self.seen - count)
        self._drop(self.members[::-1], "drop_back", count)

    @staticmethod
    def _drop(members: list[TokenBuffer | PackedBuffer], how: str, count: int) -> None:
        for member in members:
            dropped = min(count, len(member))
            getattr(member, how)(dropped)
            count -= dropped

    def clear(self) -> None:
        """Forget everything and free the memory."""
        super().clear()
        self.seen = 0
