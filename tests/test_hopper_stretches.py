"""Exact tokens beside codes: stretches of a call that programs of one launch of Hopper's kernel share."""

import functools

import pytest
import torch

from palu.kernels import tuning
from palu.kernels.decode_attention import launch
from palu.kernels.decode_attention.hopper import launch as hopper
from palu.kernels.decode_attention.hopper import sharing
from palu.kernels.decode_attention.spec import Shape
from palu.kernels.latents import MixedLatents, dense
from palu.kernels.rotation import Rotation
from tests.compile_launches import Call, arguments
from tests.hopper_calls import checked, needs_hopper, noted_launches, noted_without_gpu
from tests.kernel_calls import RandomNorm, on_device, quantized, random_call

HOW = ("additive", "one mask", "three queries", "one row of positions", "scaled", "one row with gaps", "exact only")


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("heads", [(8, 8), (16, 4)], ids=["folded", "rotated"])
@pytest.mark.parametrize("rope", ["rope", "windows", "absorbed"])
@pytest.mark.parametrize("exact", [(3, 70), (0, 1), (65, 0)], ids=["both", "newest", "first"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_some_tokens_are_exact_beside_codes(exact, rope, heads, dtype, bits, masked, monkeypatch):
    shape = Shape(2, *heads, 128, 1, 2000, (128,) * (heads[1] // 4), (256,) * (heads[1] // 4))
    query, *latents, key, value, rotation, mask = random_call(shape, getattr(torch, dtype), False, rope == "windows")
    packed, _ = quantized([latent * 3 + 0.2 for latent in latents], bits, key, value)
    first, newest = exact
    mixed, held = [], []
    for given, codes in zip(latents, packed, strict=True):
        kept = codes.narrow(1, first, shape.length - first - newest)
        some = [given[:, :first], kept, given[:, shape.length - newest :]]
        mixed.append(MixedLatents(tuple(each for each in some if each.shape[1])))
        held.append(dense(mixed[-1], torch.float32))
    if rope == "windows":
        rotation = Rotation(rotation.positions, 2e5 ** (-torch.arange(64) / 64))
        few = lambda tiles, *args: tuple(min(3, each) for each in tiles)  # noqa: E731
        monkeypatch.setattr(hopper, "parts_together", few)
    launches = noted_launches(monkeypatch)
    call = (query, *mixed, key, value, None if rope == "absorbed" else rotation)
    checked(call, shape, mask if masked else None, mask if masked else None, dtype, monkeypatch, held)
    (only,) = launches
    assert len(only.calls) == len(mixed[0].stretches)
    assert (only.tables.window is not None) == (rope == "windows")


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("how", [*HOW, "biases", "norm"])
@pytest.mark.parametrize("heads", [(8, 8), (16, 4)], ids=["folded", "rotated"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_exact_tokens_beside_codes_in_all_kinds_of_calls(dtype, heads, how, monkeypatch):
    if how in ("biases", "norm") and heads == (8, 8):
        pytest.skip("the kernel takes neither with one query per kv head")
    shape = Shape(
        2, *heads, 128, 3 if how == "three queries" else 1, 2000, (128,) * (heads[1] // 4), (256,) * (heads[1] // 4)
    )
    query, *latents, key, value, rotation, mask = random_call(shape, getattr(torch, dtype), how == "biases", True)
    positions, scale, seen = rotation.positions, 1.0, mask
    if how == "one row of positions":
        positions = positions[:1]
    elif how == "one row with gaps":
        positions[1, 1000:] += 70
    elif how == "scaled":
        scale = 1.3
    elif how == "additive":
        seen = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    elif how == "one mask":
        seen, mask = mask[:1], mask[:1].expand(2, -1, -1, -1)
    rotation = Rotation(positions, 2e5 ** (-torch.arange(64) / 64), scale)
    packed, _ = quantized(latents, 4, key, value)
    mixed = []
    for given, codes in zip(latents, packed, strict=True):
        middle = given[:, 5:1900] if how == "exact only" else codes.narrow(1, 5, 1895)
        mixed.append(MixedLatents((given[:, :5], middle, given[:, 1900:])))
    held = [dense(each, torch.float32) for each in mixed]
    monkeypatch.setattr(hopper, "parts_together", lambda tiles, *args: tuple(min(2, each) for each in tiles))
    launches, norm = noted_launches(monkeypatch), RandomNorm(128) if how == "norm" else None
    checked((query, *mixed, key, value, rotation), shape, mask, seen, dtype, monkeypatch, held, norm)
    assert [len(each.calls) for each in launches] == [3]


@needs_hopper
@torch.no_grad()
@pytest.mark.parametrize("heads", [(32, 32), (32, 8)], ids=["folded", "rotated"])
def test_exact_tokens_and_codes_are_read_as_they_were_written_just_before(heads):
    groups = heads[1] // 4
    shape = Shape(2, *heads, 128, 1, 3000, (128,) * groups, (384,) * groups)
    query, *latents, key, value, rotation, _ = random_call(shape, torch.float16, False, True)
    packed, _ = quantized(latents, 4, key, value)
    mixed = [
        MixedLatents((given[:, :4].clone(), codes.narrow(1, 4, 2896), given[:, 2900:].clone()))
        for given, codes in zip(latents, packed, strict=True)
    ]
    call = on_device(query, *mixed, key, value, rotation, None)
    query, keys, values = call[:3]
    attend = functools.partial(launch.decode_attention, *call, shape.head_dim**-0.5)
    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for _ in range(30):
        written = [query, *keys.stretches[::2], *values.stretches[::2], keys.stretches[1].scales]
        for each in written:
            each.copy_(torch.rand_like(each) + 0.01)
        at_once = attend()
        torch.cuda.synchronize()
        assert torch.equal(at_once, attend())
        for each in written:
            each.copy_(torch.rand_like(each) + 0.01)
        graph.replay()
        assert torch.equal(captured, attend())


def kernels_of(noted):
    """Grids and constants of launches of the kernel that is not the one which adds up."""
    return [each[1:] for each in noted if each[0] == "hopper_kernel"]


def test_the_full_search_tries_all_plans_of_codes_beside_exact_tokens_once(monkeypatch):
    noted = noted_without_gpu(monkeypatch)
    monkeypatch.setenv(tuning.AUTOTUNE, "1")
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: run() or -len(noted))
    launch.decode_attention(*arguments(Call(8, 4, beside=130, mask=None)))
    plans = [constants["MAIN"].windows for _, constants in kernels_of(noted)]
    # The last one is taken.
    assert len(set(plans)) == len(plans) - 1 > 1
    assert plans[-1] == plans[-2]
    assert len({constants["BESIDE"] for _, constants in kernels_of(noted)}) == 1
    searched = len(plans)
    launch.decode_attention(*arguments(Call(8, 4, beside=130, mask=None)))
    assert len(kernels_of(noted)) == searched + 1
    # Of many more exact tokens, which take other shares of the time.
    launch.decode_attention(*arguments(Call(8, 4, beside=2000, mask=None)))
    assert len(kernels_of(noted)) > searched + 2


@pytest.mark.parametrize(("key_rank", "bits"), [(128, 4), (320, 4), (320, 8)])
def test_every_program_beside_codes_has_something_to_do(key_rank, bits, monkeypatch):
    noted = noted_without_gpu(monkeypatch)
    launch.decode_attention(*arguments(Call(8, bits, beside=130, key_rank=key_rank, value_rank=256, mask=None)))
    ((grid, constants),) = kernels_of(noted)
    main, beside = constants["MAIN"], constants["BESIDE"]
    parts = sharing.parts_together(
        (638, 3), (main.groups, beside.groups), (main.weighers, beside.weighers), 132
    )  # fmt: skip
    assert grid == (parts[0] * main.groups + parts[1] * beside.groups, 1, 1)
