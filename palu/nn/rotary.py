"""Rotation tables for cached keys, by each token's own position."""

import torch
from torch import Tensor, nn

from palu.core.errors import PaluError

# RoPE variants whose frequencies do not change with the length; the others would turn cached keys differently later.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_rope(rope_type: str) -> None:
    """Refuse RoPE variants whose frequencies depend on the current length.

    Raises:
        PaluError: listing the supported ones.
    """
    if rope_type not in STATIC_ROPE_TYPES:
        raise PaluError(f"rope_type {rope_type!r} is not supported; supported: {', '.join(STATIC_ROPE_TYPES)}")


class KeyRotation:
    """cos and sin of cached positions, computed once per forward pass and shared by the layers that see the same ones.

    Args:
        rotary: the model's rotary embedding, with `inv_freq` and `attention_scaling`.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        self.tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(self, positions: Tensor, kind: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables [batch, length, head_dim] for positions [batch, length].

        Args:
            kind: what tells this set of positions from another in the same forward pass (the sliding window).
        """
        key = (kind, positions.device, dtype)
        if key not in self.tables:
            inverse_frequencies = self.rotary.inv_freq.to(positions.device, torch.float32)
            angles = positions[..., None].float() * inverse_frequencies
            angles = torch.cat([angles, angles], dim=-1)
            scaling = self.rotary.attention_scaling
            self.tables[key] = ((angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype))
        return self.tables[key]
