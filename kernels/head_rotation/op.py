"""Turns queries and rebuilt keys: one launch on a GPU, the definition elsewhere."""

import torch
from torch import Tensor

from palu.kernels.availability import uses_kernels
from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.rotation import rotate

# Heads of a program.
BLOCK_HEADS = 8


def rotate_heads(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`palu.kernels.rotation.rotate` of heads that share their tables; the definition passes over them five times.

    Args:
        states: [batch, heads, length, head_dim]; cos, sin: [batch or 1, length, head_dim].
    """
    needs_gradient = torch.is_grad_enabled() and states.requires_grad
    if not uses_kernels(states) or torch.compiler.is_compiling() or needs_gradient or not _takes(states, cos, sin):
        return rotate(states, cos[:, None], sin[:, None])
    return launch_rotation(states, cos, sin)


def _takes(states: Tensor, cos: Tensor, sin: Tensor) -> bool:
    there = states.numel() > 0 and states.dtype != torch.float64
    return there and states.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1


def launch_rotation(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate_heads`, by the kernel."""
    # Here, so that machines without a GPU need no Triton.
    from palu.kernels.head_rotation.kernel import rotate_kernel
    from palu.kernels.relaunch import relaunch

    batch, heads, length, width = states.shape
    output = states.new_empty(batch, heads, length, width, dtype=torch.promote_types(states.dtype, cos.dtype))
    rows = [table.stride(0) if table.shape[0] > 1 else 0 for table in (cos, sin)]
    relaunch(
        rotate_kernel, (batch * length, cdiv(heads, BLOCK_HEADS)),
        states, cos, sin, output, length, *states.stride()[:3], rows[0], cos.stride(1), rows[1], sin.stride(1),
        HEADS=heads, HALF=width // 2, BLOCK_HEADS=BLOCK_HEADS, BLOCK_HALF=next_power_of_2(width // 2),
    )  # fmt: skip
    return output
