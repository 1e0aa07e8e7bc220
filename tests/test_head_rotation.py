"""The kernel that turns queries and keys against the definition."""

import pytest
import torch

from palu.kernels.head_rotation.op import launch_rotation, rotate_heads
from palu.kernels.rotation import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(1, 4, 1, 128), (3, 9, 2, 96), (2, 1, 8, 64), (2, 3, 21, 64)])
@pytest.mark.parametrize("tables", ["of each row", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_equals_the_definition(shape, tables, dtype):
    batch, heads, length, width = shape
    # As a projection leaves them: [batch, length, heads, head_dim].
    states = torch.randn(batch, length, heads, width, device=DEVICE, dtype=dtype).transpose(1, 2)
    rows = batch if tables == "of each row" else 1
    cos, sin = torch.randn(2, rows, length, width, device=DEVICE, dtype=dtype)
    expected = rotate(states.double(), cos[:, None].double(), sin[:, None].double())
    got = launch_rotation(states, cos, sin)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.allclose(got.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.allclose(
        rotate_heads(states, cos, sin).double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2
    )
