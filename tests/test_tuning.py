"""The full search over launch configurations: only where asked for, once per shape class, and always the same sums."""

import pytest
import torch

from palu.kernels import tuning
from palu.kernels.decode_attention import launch
from palu.kernels.decode_attention.spec import SHAPES
from palu.kernels.latent_scores import configs
from palu.kernels.quantize import Quantization, quantization_widths, quantize
from tests.kernel_calls import close, defined, on_device, random_call

CPU = torch.device("cpu")


@pytest.fixture
def search(monkeypatch):
    """A search that takes the candidate timed last; returns what was timed."""
    timed = []
    monkeypatch.setenv(tuning.AUTOTUNE, "1")
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: timed.append(run()) or -len(timed))
    return timed


def test_without_the_environment_the_first_is_taken_and_nothing_is_timed(monkeypatch):
    monkeypatch.delenv(tuning.AUTOTUNE, raising=False)
    assert tuning.pick("a", [3, 1, 2], pytest.fail, CPU) == 3
    monkeypatch.setenv(tuning.AUTOTUNE, "0")
    assert tuning.pick("a", [3, 1, 2], pytest.fail, CPU) == 3


def test_every_shape_class_is_searched_once(search):
    assert [tuning.pick("a", [3, 1, 2], lambda candidate: candidate, CPU) for _ in range(3)] == [2, 2, 2]
    assert search == [3, 1, 2]
    tuning.pick("b", [3, 1], lambda candidate: candidate, CPU)
    assert search == [3, 1, 2, 3, 1]


def test_configurations_that_need_too_much_are_not_taken(monkeypatch):
    def launch_it():
        raise tuning.OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda run, **options: run())
    assert tuning._milliseconds(launch_it) == float("inf")


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 4])
def test_whatever_is_found_computes_the_same(bits, search, monkeypatch):
    monkeypatch.setattr(launch, "runs_hopper_kernel", lambda device: False)
    # Few, so that the interpreter is done soon.
    monkeypatch.setattr(configs, "GRID", (configs.Config(2, 64, 4, 2), configs.Config(1, 64, 8, 1)))
    monkeypatch.setattr(launch, "GRID", (launch.Config(1, 2), launch.Config(2, 5)))
    shape = SHAPES[0]
    query, *latents, key, value, rotation, mask = random_call(shape, torch.float32, False, gapless=True)
    held = latents
    if bits < 16:
        sides = zip(latents, (shape.key_ranks, shape.value_ranks), strict=True)
        latents = [quantize(each, Quantization(bits, quantization_widths(ranks, None))) for each, ranks in sides]
        held = [packed.dequantized(torch.float32) for packed in latents]
    scaling = shape.head_dim**-0.5
    expected = defined(query, *held, key, value, rotation, mask, scaling, shape, None)
    output = launch.decode_attention(*on_device(query, *latents, key, value, rotation, mask), scaling)
    assert len(search) > 2
    assert close(output, expected, "float32")
