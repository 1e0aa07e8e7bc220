"""A tensor of tokens that grows at the back and shrinks at either end without copying at every step."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Storage is given back when it is larger than this times the held tokens, plus the slack that spares tiny buffers.
SHRINK_FACTOR = 4
SHRINK_SLACK = 16


class TokenBuffer:
    """[batch, capacity, width] storage of which the tokens start..stop are held.

    Appending doubles the capacity when it is full, so n appended tokens cost O(n) copies. Dropping tokens moves the
    ends only; the room in front is reused when the back is full.
    """

    def __init__(self) -> None:
        self.storage: Tensor | None = None
        self.start = 0
        self.stop = 0

    @property
    def parts(self) -> list["TokenBuffer"]:
        """The tensors that make up this buffer: itself (a packed buffer has several)."""
        return [self]

    def as_latents(self, tensors: list[Tensor]) -> Tensor:
        """What `encode` returned, as the attention takes it."""
        return tensors[0]

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """What is stored for new tokens, one tensor per part."""
        return [tokens]

    def write_at(self, slots: Tensor, tokens: Tensor) -> None:
        """Store [batch, new, width] in slots [new] of storage of fixed size."""
        self.storage.index_copy_(1, slots, tokens)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> int:
        """Rows of the batch, -1 before the first token."""
        return -1 if self.storage is None else self.storage.shape[0]

    @property
    def tokens(self) -> Tensor:
        """View of the held tokens, [batch, length, width]."""
        return self.last(len(self))

    def last(self, count: int) -> Tensor:
        """View of the newest `count` tokens, [batch, count, width]."""
        return self.storage.narrow(1, self.stop - count, count)

    def append(self, tokens: Tensor, max_length: int | None = None) -> None:
        """Add [batch, new, width] at the back; `max_length` bounds the growth by doubling where it is known."""
        self.room(tokens, tokens.shape[2], tokens.dtype, max_length).copy_(tokens)
        self.stop += tokens.shape[1]

    def room(self, tokens: Tensor, width: int, dtype: torch.dtype, max_length: int | None = None) -> Tensor:
        """Where what becomes of new tokens [batch, new, ...] is to be written, [batch, new, width], behind those held.

        Raises:
            ValueError: if the held tokens have another number of rows.
        """
        batch, new = tokens.shape[:2]
        if self.storage is None:
            self.storage = tokens.new_empty(batch, new, width, dtype=dtype)
        elif batch != self.rows:
            raise ValueError(f"tokens of {batch} rows do not fit behind those of {self.rows}")
        elif self.stop + new > self.storage.shape[1]:
            self._make_room(new, max_length)
        return self.storage.narrow(1, self.stop, new)

    def _make_room(self, new: int, max_length: int | None) -> None:
        needed = len(self) + new
        capacity = self.storage.shape[1]
        if 2 * needed > capacity:
            doubled = 2 * capacity if max_length is None else min(2 * capacity, max_length)
            capacity = max(needed, doubled)
        batch, _, width = self.storage.shape
        room = self.storage.new_empty(batch, capacity, width)
        room[:, : len(self)] = self.tokens
        self.storage, self.start, self.stop = room, 0, len(self)

    def drop_front(self, count: int) -> None:
        """Forget the `count` oldest tokens, and give back the memory where most of it is unused then."""
        self.start = min(self.stop, self.start + count)
        if self.storage is not None and self.storage.shape[1] > SHRINK_FACTOR * len(self) + SHRINK_SLACK:
            self.storage, self.start, self.stop = self.tokens.clone(), 0, len(self)

    def drop_back(self, count: int) -> None:
        """Forget the `count` newest tokens."""
        self.stop = max(self.start, self.stop - count)

    def take(self, slots: Tensor, widths: Sequence[int]) -> None:
        """Keep only the tokens in `slots`, int64 [batch, kept, groups]: every row and group of columns its own."""
        self.storage = taken(self.tokens, slots, widths)
        self.start, self.stop = 0, slots.shape[1]

    def put(self, where: Tensor, tokens: Tensor) -> None:
        """Replace the held tokens by others [batch, held, width] where a mask [batch, held] says so."""
        self.storage, self.start, self.stop = torch.where(where[..., None], tokens, self.tokens), 0, len(self)

    def select_rows(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows of the batch; `rows` are indices or a boolean mask."""
        if self.storage is not None:
            self.storage = self.storage[rows.to(self.storage.device)]

    def repeat_rows(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times, copies side by side."""
        if self.storage is not None:
            self.storage = self.storage.repeat_interleave(repeats, dim=0)

    def move(self, device: torch.device) -> None:
        """Move the storage to another device."""
        if self.storage is not None:
            self.storage = self.storage.to(device, non_blocking=True)

    def clear(self) -> None:
        """Forget everything and free the storage."""
        self.storage, self.start, self.stop = None, 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the held tokens."""
        return 0 if self.storage is None else self.tokens.nbytes

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the storage, the room to grow included."""
        return 0 if self.storage is None else self.storage.nbytes


def taken(tokens: Tensor, slots: Tensor, widths: Sequence[int]) -> Tensor:
    """Tokens [batch, length, sum(widths)] from `slots` [batch, kept, groups], one group of columns after the other."""
    parts = tokens.split(list(widths), dim=2)
    return torch.cat(
        [
            part.gather(1, slots[..., group, None].expand(-1, -1, width))
            for group, (part, width) in enumerate(zip(parts, widths, strict=True))
        ],
        dim=2,
    )
