"""What buffers that are made of several buffers share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class BufferGroup:
    """Buffers whose rows are selected, moved and counted together.

    Args:
        members: token buffers, or groups of them; each keeps its own tokens.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = list(members)

    @property
    def parts(self) -> list[Any]:
        """Every token buffer inside."""
        return [part for member in self.members for part in member.parts]

    @property
    def rows(self) -> int:
        """Rows of the batch, -1 before the first token."""
        return max(member.rows for member in self.members)

    def select_rows(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows of the batch."""
        for member in self.members:
            member.select_rows(rows)

    def repeat_rows(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        for member in self.members:
            member.repeat_rows(repeats)

    def move(self, device: torch.device) -> None:
        """Move everything to another device."""
        for member in self.members:
            member.move(device)

    def clear(self) -> None:
        """Forget everything and free the memory."""
        for member in self.members:
            member.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the held tokens."""
        return sum(member.nbytes for member in self.members)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of memory behind them."""
        return sum(member.allocated_nbytes for member in self.members)
