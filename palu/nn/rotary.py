"""The rotary embedding of cached keys, by each token's own position."""

import torch
from torch import Tensor, nn

from palu.core.errors import PaluError
from palu.kernels.availability import uses_kernels
from palu.kernels.decode_attention.compiled import own_positions
from palu.kernels.rotation import Rotation

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
    """Positions and rotary embedding of cached keys, shared by the layers of a forward pass that see the same ones.

    Args:
        rotary: the model's rotary embedding, with `inv_freq` and `attention_scaling`.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        self.rotations: dict[tuple, Rotation] = {}

    def __call__(self, positions: Tensor, kind: int | None) -> Rotation:
        """The rotation of keys at positions [batch, length].

        Args:
            kind: what tells this set of positions from another in the same forward pass (the sliding window).
        """
        key = (kind, positions.device)
        if key not in self.rotations:
            if torch.compiler.is_compiling() and uses_kernels(positions):
                positions = own_positions(positions)
            self.rotations[key] = Rotation(positions, self.rotary.inv_freq, self.rotary.attention_scaling)
        return self.rotations[key]
