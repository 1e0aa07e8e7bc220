"""The decode kernel for GPUs of compute capability 9: what it computes there."""

import dataclasses
import functools
import itertools

import pytest
import torch

from palu.kernels.decode_attention import launch
from palu.kernels.decode_attention.hopper import kind, plans
from palu.kernels.decode_attention.hopper import launch as hopper
from palu.kernels.decode_attention.spec import HOPPER_SHAPES, Shape
from palu.kernels.latent_scores.tables import lane_table
from palu.kernels.latents import MixedLatents, dense
from palu.kernels.quantize import PackedLatents
from palu.kernels.rotation import Rotation
from tests.hopper_calls import MEMORY, are_copied, checked, needs_hopper, noted_launches
from tests.kernel_calls import close, defined, name_of, on_device, quantized, random_call

MORE_PLANS = ((2, 32, 4), (1, 64, 3), (3, 16, 3), (2, 64, 2), (4, 16, 6))


@pytest.mark.parametrize("pairs", [32, 48, 64])
def test_tables_hold_what_each_of_four_lanes_needs_side_by_side(pairs):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rotation = Rotation(torch.randint(0, 1000, (2, 5), device=device), 1e4 ** (-torch.arange(pairs) / pairs))
    cos, sin = (table[..., :pairs] for table in rotation.tables(torch.float32))
    table = lane_table(rotation, torch.float32)
    padded = 1 << (pairs - 1).bit_length()
    assert table.shape == (2, 5, 2 * padded)
    for pair in range(pairs):
        # Pair 4 i + c lies in lane c, the i-th there; both cosines of two come first.
        number = pair // 4
        at = pair % 4 * (padded // 2) + number // 2 * 4 + number % 2
        assert torch.allclose(table[..., at], cos[..., pair], atol=2e-7)
        assert torch.allclose(table[..., at + 2], sin[..., pair], atol=2e-7)
    assert table.count_nonzero() <= 2 * pairs * 10


def masks_of(shape):
    """Boolean masks [batch, 1, queries, length]: tokens here and there, tiles at an end, in the middle, all but one."""
    seen = torch.rand(shape.batch, 1, shape.queries, shape.length) < 0.7
    seen[..., -1] = True
    token = torch.arange(shape.length).expand_as(seen)
    third = shape.length // 3
    yield "some", seen
    yield "start", token >= 2 * third
    yield "end", token <= third
    yield "middle", (token < third) | (token >= 2 * third)
    yield "all but one", token == third


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=name_of)
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "absorbed"])
@pytest.mark.parametrize("masked", ["boolean", "additive", "none"])
@pytest.mark.parametrize("parts", [None, 3])
def test_the_kernel_equals_the_definition(shape, dtype, rope, masked, parts, monkeypatch):
    # On a large GPU every program would have one tile.
    if parts is not None:
        monkeypatch.setattr(hopper, "parts_of", lambda *args: parts)
    *call, rotation, mask = random_call(shape, getattr(torch, dtype), False)
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    given = {"boolean": mask, "additive": additive, "none": None}[masked]
    call = (*call, rotation if rope else None)
    checked(call, shape, None if given is None else mask, given, dtype, monkeypatch)


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=name_of)
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "absorbed"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_kernel_reads_codes(shape, dtype, rope, symmetric, bits, monkeypatch):
    if not are_copied(shape, bits):
        pytest.skip("groups do not begin where copies can")
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 3)
    query, *latents, key, value, rotation, mask = random_call(shape, getattr(torch, dtype), False)
    packed, held = quantized([latent * 3 + 0.2 for latent in latents], bits, key, value, symmetric=symmetric)
    call = (query, *packed, key, value, rotation if rope else None)
    checked(call, shape, mask, mask, dtype, monkeypatch, held)


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", list(itertools.permutations((8, 4, 3, 2), 2)), ids=str)
@pytest.mark.parametrize("heads", [(8, 8), (16, 4)], ids=["folded", "rotated"])
@pytest.mark.parametrize("rope", ["rope", "windows", "absorbed"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("rank", [128, 192])
def test_keys_and_values_may_have_different_bits(rank, symmetric, rope, heads, bits, monkeypatch):
    groups = heads[1] // 4
    shape = Shape(2, *heads, 128, 1, 2000, (rank,) * groups, (256,) * groups)
    query, *latents, key, value, rotation, mask = random_call(shape, torch.float16, False, rope == "windows")
    of_keys, of_values = (quantized(latents, each, key, value, symmetric=symmetric) for each in bits)
    packed, held = zip(*[(each[0][side], each[1][side]) for side, each in enumerate((of_keys, of_values))], strict=True)
    if rope == "windows":
        rotation = Rotation(rotation.positions, 2e5 ** (-torch.arange(64) / 64))
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 3)
    call = (query, *packed, key, value, None if rope == "absorbed" else rotation)
    checked(call, shape, mask, mask, "float16", monkeypatch, held)


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("unwritten", [0.0, float("nan")], ids=["zero", "nan"])
@pytest.mark.parametrize("heads", [(8, 8), (16, 4)], ids=["folded", "rotated"])
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "absorbed"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_scales_of_hidden_tokens_may_be_anything(heads, rope, symmetric, unwritten, bits, monkeypatch):
    shape = Shape(2, *heads, 128, 1, 500, (128,) * (heads[1] // 4), (256,) * (heads[1] // 4))
    query, *latents, key, value, rotation, mask = random_call(shape, torch.float16, False)
    packed, held = quantized(latents, bits, key, value, symmetric=symmetric)
    hidden = ~mask[:, 0, 0, :, None]
    packed = [
        PackedLatents.of(each.codes, each.parameters.masked_fill(hidden, unwritten), each.quantization)
        for each in packed
    ]
    call = (query, *packed, key, value, rotation if rope else None)
    checked(call, shape, mask, mask, "float16", monkeypatch, held)


# Heads, latents of the key groups and of the value groups, bits that the kernel takes of these.
WIDE = [
    ((16, 4, 128), (320,), (256,), (16, 8, 4, 3, 2)), ((16, 8, 128), (384, 96), (256, 192), (16, 8, 4, 2)),
    ((16, 8, 128), (512,), (384,), (4, 2)), ((4, 4, 128), (320,), (256,), (4, 2)),
    ((12, 4, 96), (384,), (256,), (16, 3)), ((16, 8, 64), (320,), (256,), (8, 2)),
]  # fmt: skip


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("rope", ["rope", "windows", "absorbed"])
@pytest.mark.parametrize("beside", [False, True], ids=["one kind", "some exact"])
@pytest.mark.parametrize(
    ("heads", "key_ranks", "value_ranks", "bits"),
    [(*case, bits) for *case, each in WIDE for bits in each], ids=lambda value: str(value).replace(", ", "-"),
)  # fmt: skip
def test_keys_may_have_many_latents(heads, key_ranks, value_ranks, bits, beside, rope, monkeypatch):
    if beside and (bits == 16 or max(key_ranks) == 512):
        pytest.skip("numbers of 16 bits would not be taken")
    shape = Shape(2, *heads, 1, 2100, key_ranks, value_ranks)
    query, *latents, key, value, rotation, mask = random_call(shape, torch.float16, False, rope == "windows")
    packed, held = quantized(latents, bits, key, value)
    if beside:
        packed = [
            MixedLatents((given[:, :4], codes.narrow(1, 4, 1996), given[:, 2000:]))
            for given, codes in zip(latents, packed, strict=True)
        ]
        held = [dense(each, torch.float32) for each in packed]
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 2)
    monkeypatch.setattr(hopper, "parts_together", lambda tiles, *args: (2, *[1 for _ in tiles[1:]]))
    call = (query, *packed, key, value, None if rope == "absorbed" else rotation)
    seen, launches = None if rope == "windows" else mask, noted_launches(monkeypatch)
    checked(call, shape, seen, seen, "float16", monkeypatch, held)
    # Numbers of several queries, and folded ones, of heads wide enough.
    windows = heads[2] > 64 and (bits == 16 or heads[0] == heads[1])
    assert [each.tables.window is not None for each in launches] == [rope != "absorbed" and windows]


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [3, 2])
@pytest.mark.parametrize("start", [1, 2, 3, 8])
def test_codes_may_begin_anywhere_in_memory(start, bits, monkeypatch):
    shape = Shape(2, 16, 4, 128, 1, 700, (96,), (352,))
    query, *latents, key, value, rotation, _ = random_call(shape, torch.float16, False)
    packed, held = quantized(latents, bits, key, value)
    left, scaling = dataclasses.replace(shape, length=shape.length - start), shape.head_dim**-0.5
    seen, held = torch.ones(2, 1, 1, left.length, dtype=torch.bool), [each[:, start:] for each in held]
    expected = defined(query, *held, key, value, rotation.narrow(start, left.length), seen, scaling, left, None)
    launches, launched = [], hopper.launch
    monkeypatch.setattr(hopper, "launch", lambda *args: launches.append(1) or launched(*args))
    query, *packed, key, value, rotation = on_device(query, *packed, key, value, rotation)
    codes = [each.narrow(1, start, left.length) for each in packed]
    call = (query, *codes, key, value, rotation.narrow(start, left.length), None)
    assert close(launch.decode_attention(*call, scaling), expected, "float16")
    assert launches


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("heads", [(8, 8), (16, 4)], ids=["folded", "rotated"])
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "absorbed"])
@pytest.mark.parametrize("kind", ["some", "start", "end", "middle", "all but one"])
def test_hidden_tiles_change_nothing(heads, rope, kind, monkeypatch):
    shape = Shape(2, *heads, 128, 1, 1500, (128,) * (heads[1] // 4), (256,) * (heads[1] // 4))
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 4)
    *call, rotation, _ = random_call(shape, torch.float16, False)
    mask = dict(masks_of(shape))[kind]
    checked((*call, rotation if rope else None), shape, mask, mask, "float16", monkeypatch)
    one = mask[:1].expand(2, -1, -1, -1)
    checked((*call, rotation if rope else None), shape, one, mask[:1], "float16", monkeypatch)


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("plan", [*plans.LAST_PLANS, *(plans.Plan(*each) for each in MORE_PLANS)])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (2, 2, None)], ids=["folded", "rotated", "absorbed"])
@pytest.mark.parametrize("bits", [16, 4, 3, 2])
def test_every_plan_computes_the_same(plan, heads, bits, monkeypatch):
    shape = Shape(1, *heads[:2], 128, 1, 1700, (128,), (256,))
    found = plans.heads_of(heads[0], 1, heads[1] if len(heads) == 2 else None)
    if plan not in plans.plans_for(found, 128, (128,), (256,), (bits, bits), MEMORY, False, True):
        pytest.skip("does not fit")
    monkeypatch.setattr(kind, "plans_for", lambda *args: (plan,))
    # Kinds know their plans.
    monkeypatch.setattr(kind, "the_kind", functools.cache(kind.Kind))
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 2)
    for gapless in (False, True) if len(heads) == 2 and bits < 16 else (False,):
        query, *latents, key, value, rotation, mask = random_call(shape, torch.float16, False, gapless)
        packed, held = quantized(latents, bits, key, value)
        call = (query, *packed, key, value, rotation if len(heads) == 2 else None)
        checked(call, shape, mask, mask, "float16", monkeypatch, held)


@needs_hopper
@torch.no_grad()
@pytest.mark.parametrize("heads", [(32, 32), (32, 8)], ids=["folded", "rotated"])
@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_the_same_call_gives_the_same_numbers_every_time(heads, bits):
    groups = heads[1] // 4
    shape = Shape(1, *heads, 128, 1, 20000, (128,) * groups, (384,) * groups)
    query, *latents, key, value, rotation, _ = random_call(shape, torch.float16, False)
    moved = on_device(query, *quantized(latents, bits, key, value)[0], key, value, rotation, None)
    outputs = [launch.decode_attention(*moved, shape.head_dim**-0.5) for _ in range(20)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    ("rows_heads", "head_dim", "chunks", "outputs"),
    [
        (32, 128, 3, (32, True)),
        (64, 128, 3, (64, True)),
        (128, 128, 3, (128, True)),
        (256, 128, 3, (128, False)),
        (256, 128, 4, (64, False)),
        (256, 64, 3, (64, False)),
        (44, 96, 1, (32, True)),
        (133, 96, 1, (128, False)),
    ],
)
def test_programs_that_add_parts_up_have_a_multiprocessor_each_where_there_are_enough(
    rows_heads, head_dim, chunks, outputs
):
    assert hopper.outputs_of(rows_heads, head_dim, chunks, 132) == outputs
