"""What is launched again is what Triton itself would launch."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from palu.kernels import relaunch as module
from palu.kernels.head_rotation import kernel as rotation
from palu.kernels.head_rotation.op import launch_rotation
from palu.kernels.relaunch import Constants, relaunch
from palu.kernels.rotation import rotate

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GRID = (4, 2)


class Kernel:
    """Stands in for a kernel: what Triton launches, and what is launched again without it."""

    params = tuple(
        SimpleNamespace(name=name, do_not_specialize=name == "length")
        for name in ("states", "output", "length", "stride", "WIDTH", "KIND")
    )

    def __init__(self):
        self.launches, self.again = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.append((grid, arguments, constants))
            return Again(self)

        return launch


class Again:
    """Stands in for what was compiled."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.again.append((grid, arguments))


@pytest.fixture
def compiled(monkeypatch):
    """A kernel that Triton compiles."""
    monkeypatch.setattr(module, "JITFunction", Kernel)
    monkeypatch.setattr(module, "CompiledKernel", Again)
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module, "_orders", {})
    return Kernel()


def start(kernel, tensors=None, length=100, stride=48, **others):
    tensors = tensors or [torch.zeros(64), torch.zeros(64)]
    relaunch(kernel, GRID, *tensors, length, stride, **{"KIND": "a", "WIDTH": 5, "num_warps": 2, **others})
    return tensors


def test_what_triton_does_not_compile_is_launched_as_it_is():
    kernel = Kernel()
    tensors = start(kernel)
    start(kernel, tensors)
    constants = {"KIND": "a", "WIDTH": 5, "num_warps": 2}
    assert kernel.launches == [(GRID, (*tensors, 100, 48), constants)] * 2
    assert not kernel.again


def test_a_launch_as_one_before_is_given_addresses_and_constants_in_the_order_of_the_parameters(compiled):
    start(compiled)
    tensors = start(compiled, length=7)
    assert len(compiled.launches) == 1
    pointers = [tensor.data_ptr() for tensor in tensors]
    assert compiled.again == [((*GRID, 1), (*pointers, 7, 48, 5, "a"))]
    # Constants that are made once are the same ones.
    constants = Constants(KIND="a", WIDTH=5, num_warps=2)
    relaunch(compiled, GRID, *tensors, 7, 48, constants=constants)
    assert len(compiled.again) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"stride": 1},
        {"stride": 40},
        {"stride": 48.0},
        {"stride": 1 << 31},
        {"length": 1 << 31},
        {"WIDTH": 6},
        {"KIND": "b"},
        {"num_warps": 4},
        {"tensors": [torch.zeros(64), torch.zeros(64).half()]},
        {"tensors": [torch.zeros(65)[1:], torch.zeros(64)]},
        {"tensors": [torch.zeros(64), torch.zeros(65)[1:]]},
    ],
    ids=lambda other: "-".join(f"{name} {value}" for name, value in other.items())[:20],
)
def test_triton_is_asked_where_it_may_compile_other_code(other, compiled):
    start(compiled)
    start(compiled, **other)
    assert len(compiled.launches) == 2
    # Of another length and of another multiple the code is the same.
    start(compiled, length=3, stride=64)
    assert len(compiled.launches) == 2
    assert len(compiled.again) == 1


def test_tensors_that_are_elsewhere_are_triton_s_to_refuse(compiled):
    tensors = start(compiled)
    there = SimpleNamespace(data_ptr=tensors[1].data_ptr, dtype=tensors[1].dtype, get_device=lambda: 1)
    start(compiled, [tensors[0], there])
    assert len(compiled.launches) == 2


def test_what_triton_did_not_hand_out_is_not_remembered(compiled, monkeypatch):
    monkeypatch.setattr(module, "CompiledKernel", str)
    for _ in range(2):
        start(compiled)
    assert len(compiled.launches) == 2


def test_constants_come_from_one_place(compiled):
    with pytest.raises(TypeError, match="constants or KIND, not both"):
        relaunch(compiled, (4,), torch.zeros(3), constants=Constants(WIDTH=5), KIND="a")


def test_what_is_remembered_is_bounded(compiled, monkeypatch):
    monkeypatch.setattr(module, "MOST_KNOWN", 3)
    for width in range(14):
        start(compiled, WIDTH=width)
        assert len(module._known) <= 3


@needs_gpu
@pytest.mark.usefixtures("empty_memory_is_nan")
def test_launches_that_need_other_code_are_told_apart(monkeypatch):
    # Lengths and strides of one and of multiples of 16 and not, pointers that are multiples of 16 bytes and not.
    monkeypatch.setattr(module, "_known", {})
    starts, lengths, heads, dtypes = (0, 1, 8), (1, 5, 16), (1, 3, 16), (torch.float16, torch.float32)
    for _ in range(3):
        for first, length, count, dtype in itertools.product(starts, lengths, heads, dtypes):
            states = torch.randn(2, length, count, 80, dtype=dtype, device="cuda")[..., first : first + 64]
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
