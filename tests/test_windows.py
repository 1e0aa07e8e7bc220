"""Windows of positions, in which the decode kernel for Hopper interpolates keys."""

import pytest
import torch

from palu.kernels.decode_attention import launch
from palu.kernels.decode_attention.hopper import kind, plans
from palu.kernels.decode_attention.hopper import launch as hopper
from palu.kernels.decode_attention.hopper.spans import GAPS, spans_of
from palu.kernels.decode_attention.spec import Shape
from palu.kernels.latent_scores.factors import bounded_factor, ordered_factor, unit_order
from palu.kernels.latents import LatentProjection
from palu.kernels.rotation import Rotation
from tests.compile_launches import Call, arguments
from tests.hopper_calls import (
    LLAMA_2,
    LLAMA_3,
    MEMORY,
    checked,
    fitting,
    needs_hopper,
    noted_launches,
    noted_without_gpu,
)
from tests.kernel_calls import quantized, random_call


@pytest.mark.parametrize("bits", [8, 4])
def test_windows_of_real_models_fit(bits):
    for heads in (LLAMA_2, LLAMA_3):
        assert fitting(heads, 128, 384, bits=bits, windows=True)[0].value_stages >= 3
        assert not fitting(heads, 128, 384, 131 << 10, bits=bits, windows=True)
    assert not fitting(LLAMA_2, 256, 128, bits=bits, windows=True)
    # More slots than there are columns of slow pairs for.
    assert not fitting(plans.heads_of(28, 1, 4), 128, 384, bits=bits, windows=True)
    assert not plans.plans_for(LLAMA_2, 64, (128,), (384,), (bits, bits), MEMORY, True, False)


def test_slow_pairs_of_factors_stay_in_shared_memory_where_that_leaves_room():
    two_folded, two_turned = plans.heads_of(32, 16, 2), plans.heads_of(32, 4, 2)
    # A program with few values on their way waits for them: one head's slow pairs are copied at a time instead.
    assert not fitting(two_folded, 256, 256, bits=8, windows=True)[0].stays
    assert fitting(two_folded, 256, 256, bits=4, windows=True)[0].stays
    assert fitting(two_folded, 192, 320, bits=8, windows=True)[0].stays
    # With several queries one section at a time, or all.
    assert not fitting(two_turned, 256, 256, windows=True)[0].stays
    assert fitting(two_turned, 192, 320, windows=True)[0].stays
    assert [plans.held_of("mixed", 4, stays) for stays in (False, True)] == [1, 4]
    assert not fitting(plans.heads_of(64, 4, 2), 256, 320, bits=8, windows=True)[0].stays
    # Of one section there is no smaller part.
    assert all(plan.stays for plan in fitting(LLAMA_3, 128, 384, all_of_them=True, bits=8, windows=True))
    # Where values have few latents, nothing is gained by copying.
    assert fitting(two_folded, 128, 128, bits=4, windows=True)[0].stays


@pytest.mark.parametrize(("heads", "rank", "bits", "taken"), [
    ((32, 32), 128, 16, True), ((32, 8), 128, 16, False), ((32, 8), 128, 8, True),
    ((32, 8), 192, 16, True), ((32, 8), 256, 16, True), ((32, 32), 256, 16, True),
])  # fmt: skip
def test_windows_are_for_codes_one_query_per_kv_head_or_many_latents(heads, rank, bits, taken, monkeypatch):
    monkeypatch.setattr(kind, "block_memory", lambda device: MEMORY)
    shape = Shape(1, *heads, 128, 1, 40, (rank,) * (heads[1] // 4), (256,) * (heads[1] // 4))
    query, *latents, key, value, _, _ = random_call(shape, torch.float16, False)
    if bits < 16:
        latents, _ = quantized(latents, bits, key, value)
    assert kind.kind_of(query, *latents, key, value, None, None).takes_windows == taken


def test_only_rows_whose_visible_tokens_follow_each_other_count_as_gapless():
    length = 300
    token = torch.arange(length)
    positions = torch.stack([token + 5, (token - 70).clamp(min=0), token * 2, token + 300 * (token > 130)])
    rotation = Rotation(positions, torch.ones(64))
    hidden = spans_of(rotation, None, 0, length, 1, 64).tolist()
    assert hidden == [[5, 0, 5], [GAPS, 0, 5], [GAPS, 0, 5], [GAPS, 0, 5]]
    # Padding on the left; every other token; a window behind the gap; a row that sees nothing.
    masks = torch.stack([token >= 70, token >= 70, token % 2 == 0, token > 130])
    assert spans_of(rotation, masks, 0, length, 1, 64).tolist() == [[5, 1, 5], [-70, 1, 5], [GAPS, 0, 5], [300, 2, 5]]
    nothing = torch.zeros(1, length, dtype=torch.bool)
    assert {row[0] for row in spans_of(rotation, nothing, 0, length, 1, 64).tolist()} == {GAPS}
    additive = torch.zeros(masks.shape).masked_fill(~masks, float("-inf"))
    assert torch.equal(spans_of(rotation, additive, 0, length, 1, 64), spans_of(rotation, masks, 0, length, 1, 64))
    # Two queries per row of positions, of which the later one sees a token more.
    causal = torch.stack([token < 298, token < 300]).repeat(4, 1)
    assert spans_of(rotation, causal, 0, length, 2, 64)[:, 0].tolist() == [5, 5, *[GAPS] * 6]


@torch.no_grad()
def test_what_was_made_of_a_mask_or_a_factor_is_not_taken_for_another_one():
    rotation, length = Rotation(torch.arange(130)[None], torch.ones(64)), 130
    mask = torch.ones(1, length, dtype=torch.bool)
    assert spans_of(rotation, mask, 0, length, 1, 64).tolist() == [[0, 0, 3]]
    mask[:, :70] = False
    assert spans_of(rotation, mask, 0, length, 1, 64).tolist() == [[0, 1, 3]]
    for first in range(0, 130, 10):
        # Each may get the memory of the one before.
        mask = torch.arange(length)[None] >= first
        assert spans_of(rotation, mask, 0, length, 1, 64).tolist() == [[0, first // 64, 3]]
    projection = torch.nn.Linear(64, 8, bias=False)
    key = LatentProjection(projection.weight, (64,))
    first = ordered_factor(key, 64, 4, torch.float32, unit_order)
    assert ordered_factor(key, 64, 4, torch.float32, unit_order) is first
    assert torch.equal(first, projection.weight[:, unit_order(64, 4)])
    projection._apply(lambda tensor: tensor * 2)
    assert torch.equal(ordered_factor(key, 64, 4, torch.float32, unit_order), 2 * first)
    projection.weight.mul_(2)
    assert torch.equal(ordered_factor(key, 64, 4, torch.float32, unit_order), 4 * first)


@torch.no_grad()
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_the_power_of_a_factor_that_is_not_finite_is_infinite(number):
    up = torch.randn(96, 64)
    up[3, 5] = number
    assert bounded_factor(LatentProjection(up, (64,)), 64, 4, torch.float32, unit_order, 40.0, 1.0)[1] == float("inf")


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4, 0.0])
def test_no_row_of_a_bounded_factor_adds_up_to_more_than_asked(size):
    key = LatentProjection(torch.randn(96, 64 + 32) * size, (64, 32))
    factor, power = bounded_factor(key, 64, 4, torch.float32, unit_order, 40.0, 2.0**-20)
    rows = factor.abs().unflatten(1, (2, 64)).sum(-1)
    assert rows.amax() <= 40.0
    assert size == 0 or rows.amax() > 19.9
    assert torch.equal(factor * power, ordered_factor(key, 64, 4, torch.float32, unit_order))


@pytest.mark.parametrize("kv_heads", [32, 8], ids=["windows", "mixed"])
@pytest.mark.parametrize("beside", [0, 130])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_is_launched_between_the_sums_and_what_adds_them_up_which_begins_early(
    dtype, beside, kv_heads, monkeypatch
):
    noted = noted_without_gpu(monkeypatch)
    # A rotation whose tables nobody has made yet.
    launch.decode_attention(*arguments(Call(kv_heads, 4, dtype, beside=beside, mask=None)))
    order = [name for name, _, _ in noted]
    # Of all pairs, and of the fast ones.
    assert order.count("table_kernel") == 2
    assert order.count("hopper_kernel") == 1
    assert order[-2:] == ["hopper_kernel", "hopper_combine_kernel"]


# Heads, kv heads, head_dim, base, latents of the key groups and of the value groups.
WINDOWED = [
    (8, 8, 128, 1e4, (128, 64), (384, 256)), (3, 3, 96, 1e6, (128,), (384,)), (5, 5, 128, 1e6, (128,), (384,)),
    (16, 4, 128, 2e5, (128,), (384,)), (6, 2, 96, 1e4, (128,), (384,)), (7, 1, 128, 1e6, (128,), (384,)),
    # Sections of latents, where a program has half of a group's heads.
    (16, 8, 128, 1e4, (192, 96), (256, 192)), (8, 8, 128, 1e4, (160, 192), (256, 192)),
    (16, 8, 128, 1e4, (256, 64), (256, 192)), (8, 8, 128, 1e4, (256, 128), (256, 192)),
    # Several windows of sections, and of one or two heads' few latents.
    (32, 4, 128, 2e5, (256,), (256,)), (4, 4, 128, 1e4, (64, 64), (256, 256)),
    # Several key groups of a program.
    (16, 8, 128, 2e5, (128, 64, 96, 128), (256, 128)), (8, 8, 128, 1e4, (128, 64, 96, 128), (256, 128)),
    (8, 8, 128, 1e4, (64,) * 4, (384,)),
]  # fmt: skip
# Four columns of slow pairs reach too few positions where frequencies fall slowly.
NOT_WINDOWED = (16, 4, 128, 1e4, (128,), (384,))


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("case", [*WINDOWED, NOT_WINDOWED], ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("gaps", ["none", "one row", "all rows"])
@pytest.mark.parametrize("hidden", ["nothing", "padding", "some", "end"])
def test_windows_of_positions_equal_the_definition(case, gaps, hidden, bits, monkeypatch):
    *heads, base, key_ranks, value_ranks = case
    shape = Shape(2, *heads, 1, 2600, key_ranks, value_ranks)
    # Programs with several windows of 1,024 tokens or fewer, or with one that they do not fill.
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 2)
    query, *latents, key, value, _, _ = random_call(shape, torch.float16, False)
    positions = torch.arange(shape.length)[None] + torch.tensor([[0], [4000]])
    if gaps != "none":
        positions[1, 1900:] += 3000
    if gaps == "all rows":
        positions[0, 5:] += 1
    frequencies = (base ** (-torch.arange(0, heads[2], 2).double() / heads[2])).float()
    rotation = Rotation(positions, frequencies)
    mask = torch.ones(2, 1, 1, shape.length, dtype=torch.bool)
    if hidden == "padding":
        mask[0, ..., :700] = mask[1, ..., :3] = False
    elif hidden == "some":
        mask = torch.rand(mask.shape) < 0.7
    elif hidden == "end":
        mask[..., 2100:] = False
    packed, held = quantized(latents, bits, key, value) if bits < 16 else (latents, None)
    launches = noted_launches(monkeypatch)
    given = None if hidden == "nothing" else mask
    checked((query, *packed, key, value, rotation), shape, mask, given, "float16", monkeypatch, held)
    # Several queries' numbers take longer to read than to multiply, but where keys have many latents.
    exact = case == NOT_WINDOWED or (bits == 16 and heads[0] > heads[1] and max(key_ranks) <= plans.MOST_AT_ONCE)
    assert [each.tables.window is not None for each in launches] == [not exact]


@needs_hopper
@torch.no_grad()
@pytest.mark.parametrize("heads", [(8, 8, 128, 1e4), (16, 4, 128, 2e5)], ids=["windows", "mixed"])
def test_windows_of_positions_may_begin_below_zero(heads, monkeypatch):
    *heads, base = heads
    shape = Shape(2, *heads, 1, 2600, (128,) * (heads[1] // 4), (384,) * (heads[1] // 4))
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 2)
    query, *latents, key, value, _, _ = random_call(shape, torch.float16, False)
    positions = torch.arange(shape.length)[None] - torch.tensor([[5000], [1500]])
    rotation = Rotation(positions, (base ** (-torch.arange(0, 128, 2).double() / 128)).float())
    mask = torch.ones(2, 1, 1, shape.length, dtype=torch.bool)
    packed, held = quantized(latents, 4, key, value)
    launches = noted_launches(monkeypatch)
    checked((query, *packed, key, value, rotation), shape, mask, None, "float16", monkeypatch, held)
    assert [each.tables.window is not None for each in launches] == [True]


@needs_hopper
@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("heads", [(8, 8), (16, 4), (1, 1)], ids=["windows", "mixed", "one head"])
@pytest.mark.parametrize("bits", [16, 4, 3, 2])
def test_windows_take_numbers_and_every_kind_of_codes_and_several_queries(heads, bits, symmetric, dtype, monkeypatch):
    if bits == 16 and symmetric:
        pytest.skip("numbers are not symmetric")
    groups = max(1, heads[1] // 4)
    # Several queries' numbers are interpolated where keys have many latents.
    rank = 192 if bits == 16 and heads == (16, 4) else 96
    shape = Shape(2, *heads, 128, 3, 2100, (rank,) * groups, (256,) * groups)
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 2)
    query, *latents, key, value, rotation, _ = random_call(shape, getattr(torch, dtype), False, gapless=True)
    rotation = Rotation(rotation.positions, 2e5 ** (-torch.arange(64) / 64), 1.2)
    mask = torch.ones(2, 1, 3, shape.length, dtype=torch.bool).tril(shape.length - 3)
    packed, held = latents, None
    if bits < 16:
        packed, held = quantized([latent * 3 + 0.2 for latent in latents], bits, key, value, symmetric=symmetric)
    launches = noted_launches(monkeypatch)
    checked((query, *packed, key, value, rotation), shape, mask, mask, dtype, monkeypatch, held)
    assert [each.tables.window is not None for each in launches] == [True]
