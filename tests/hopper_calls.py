"""What the tests of the decode kernel for Hopper share."""

import pytest
import torch

from palu.kernels.decode_attention import launch
from palu.kernels.decode_attention.hopper import kind, plans
from palu.kernels.decode_attention.hopper import launch as hopper
from palu.kernels.latent_scores import tables
from tests.kernel_calls import close, defined, on_device

MEMORY = 227 << 10
LLAMA_2, LLAMA_3 = plans.heads_of(32, 8, 4), plans.heads_of(32, 2, 4)
needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9), reason="needs compute capability 9"
)


def fitting(heads, key_rank, value_rank, memory=MEMORY, all_of_them=False, bits=16, windows=False):
    return plans.plans_for(heads, 128, (key_rank,), (value_rank,), (bits, bits), memory, windows, all_of_them)


def are_copied(shape, bits):
    """Whether copies to shared memory can take the codes of such ranks."""
    least = {8: 16, 4: 32, 3: 32, 2: 16}.get(bits, 16)
    return not any(rank % least for rank in (*shape.key_ranks, *shape.value_ranks))


def noted_launches(monkeypatch):
    """A list of every `hopper.Launch` from now on."""
    noted, launched = [], hopper._launch
    monkeypatch.setattr(
        hopper, "_launch", lambda plan, planned, found: noted.append(planned) or launched(plan, planned, found)
    )
    return noted


class Noting:
    """Stands in for a kernel; notes its name, the grid and the constants of every launch."""

    def __init__(self, name, noted):
        self.name, self.noted = name, noted

    def __getitem__(self, grid):
        return lambda *args, **constants: self.noted.append((self.name, grid, constants))


def noted_without_gpu(monkeypatch):
    """A list of what would be launched on an H100 from now on, in order: names, grids and constants."""
    noted = []
    for module, names in ((hopper, ("hopper_kernel", "hopper_combine_kernel")), (tables, ("table_kernel",))):
        for name in names:
            monkeypatch.setattr(module, name, Noting(name, noted))
    monkeypatch.setattr(kind, "block_memory", lambda device: MEMORY)
    monkeypatch.setattr(hopper, "processors", lambda device: 132)
    monkeypatch.setattr(launch, "runs_hopper_kernel", lambda device: True)
    return noted


def checked(call, shape, mask, given, dtype, monkeypatch, held=None, norm=None):
    """The kernel's output of a call is the definition's, and it was the kernel for Hopper that computed it.

    held: what packed latents stand for. norm: of the keys.
    """
    launches, launched = [], hopper.launch
    monkeypatch.setattr(hopper, "launch", lambda *args: launches.append(1) or launched(*args))
    scaling = shape.head_dim**-0.5
    seen = torch.ones(shape.batch, 1, shape.queries, shape.length, dtype=torch.bool) if mask is None else mask
    expected = defined(call[0], *(held or call[1:3]), *call[3:], seen, scaling, shape, norm)
    norm = None if norm is None else norm.cuda()
    output = launch.decode_attention(*on_device(*call, given), scaling, norm, shape.head_dim)
    assert launches
    assert close(output, expected, dtype)
