"""What is launched again is what Triton itself would launch."""

import itertools

import pytest
import torch

from palu.kernels import relaunch as module
from palu.kernels.head_rotation import kernel as rotation
from palu.kernels.head_rotation.op import launch_rotation
from palu.kernels.relaunch import relaunch
from palu.kernels.rotation import rotate

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Kernel:
    """Stands in for a kernel that is interpreted."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((grid, arguments, constants))


def test_what_triton_does_not_compile_is_launched_as_it_is():
    kernel, tensor = Kernel(), torch.zeros(3)
    for _ in range(2):
        relaunch(kernel, (4,), tensor, 3, WIDTH=5, num_warps=2)
    assert kernel.launches == [((4,), (tensor, 3), {"WIDTH": 5, "num_warps": 2})] * 2


@needs_gpu
@pytest.mark.usefixtures("empty_memory_is_nan")
def test_launches_that_need_other_code_are_told_apart(monkeypatch):
    # Lengths and strides of one and of multiples of 16 and not, pointers that are multiples of 16 bytes and not.
    monkeypatch.setattr(module, "_known", {})
    starts, lengths, heads, dtypes = (0, 1, 8), (1, 5, 16), (1, 3, 16), (torch.float16, torch.float32)
    for _ in range(3):
        for start, length, count, dtype in itertools.product(starts, lengths, heads, dtypes):
            states = torch.randn(2, length, count, 80, dtype=dtype, device="cuda")[..., start : start + 64]
            states = states.transpose(1, 2)
            tables = torch.randn(2, 2, length, 64, dtype=dtype, device="cuda")
            got = launch_rotation(states, *tables)
            wanted = rotate(states.double(), *tables[:, :, None].double())
            assert (got - wanted).abs().max() < (1e-2 if dtype == torch.float16 else 1e-5)
    assert 0 < len(module._known) <= len(starts) * len(lengths) * len(heads) * len(dtypes)


@needs_gpu
def test_a_launch_that_is_known_does_not_ask_triton(monkeypatch):
    states, tables = torch.randn(1, 8, 7, 64, device="cuda"), torch.randn(2, 1, 7, 64, device="cuda")
    first = launch_rotation(states[:, :, :1], *tables[:, :, :1])
    monkeypatch.setattr(type(rotation.rotate_kernel), "run", None)
    for length in (1, 7):
        # The length is not compiled in.
        assert torch.equal(launch_rotation(states[:, :, :length], *tables[:, :, :length])[:, :, :1], first)
