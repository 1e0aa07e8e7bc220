"""The decode kernel for GPUs of compute capability 9: what it takes, how it is laid out, what it computes there."""

import functools
import itertools

import pytest
import torch

from palu.kernels.decode_attention import launch
from palu.kernels.decode_attention.hopper import kind, plans
from palu.kernels.decode_attention.hopper import launch as hopper
from palu.kernels.decode_attention.hopper.factor import factor_of_codes
from palu.kernels.decode_attention.spec import HOPPER_SHAPES, Shape
from palu.kernels.latent_scores.factors import unit_order
from palu.kernels.latent_scores.tables import lane_table
from palu.kernels.latents import LatentProjection
from palu.kernels.quantize import PackedLatents
from palu.kernels.rotation import Rotation
from tests.hopper_calls import LLAMA_2, LLAMA_3, MEMORY, checked, fitting, needs_hopper
from tests.kernel_calls import RandomNorm, name_of, on_device, quantized, random_call

MORE_PLANS = ((2, 32, 4), (1, 64, 3), (3, 16, 3), (2, 64, 2), (4, 16, 6))


def takes(*call, key_norm=None):
    return kind.kind_of(*call, None, key_norm) is not None


def test_every_query_head_of_a_group_has_one_slot():
    for kv, queries in itertools.product((1, 2, 3, 4, 6), (1, 2, 3, 4, 7, 8)):
        heads = plans.heads_of(kv * queries, 1, kv)
        taken = set()
        for slot in range(heads.slots):
            inside = slot % heads.columns
            kv_head = slot // heads.columns * heads.together + inside // heads.query_slots
            if inside // heads.query_slots < heads.together and kv_head < kv and inside % heads.query_slots < queries:
                taken.add((kv_head, inside % heads.query_slots))
        assert len(taken) == kv * queries, (kv, queries)


def test_real_models_fit_and_more_latents_do_not():
    for heads in (LLAMA_2, LLAMA_3):
        assert fitting(heads, 128, 384)[0].value_stages >= 4
        assert not fitting(heads, 128, 384, 99 << 10)
        assert not fitting(heads, 256, 384)
        assert fitting(heads, 128, 384, all_of_them=True)[:1] == fitting(heads, 128, 384)
        assert len(fitting(heads, 128, 384, all_of_them=True, bits=4)) > len(fitting(heads, 128, 384, all_of_them=True))
    assert len(fitting(LLAMA_2, 128, 384, all_of_them=True)) > 4
    # Its queries stand beside the factors, and each group of warps that scores has a tile of its own.
    assert len(fitting(LLAMA_3, 128, 384, all_of_them=True)) == 4
    assert fitting(plans.heads_of(32, 8, None), 256, 384)
    # Sixteen query heads per kv head are more than the columns of a product, and narrow groups are left to others.
    assert not fitting(plans.heads_of(16, 1, 1), 128, 384)
    assert not fitting(LLAMA_2, 32, 96)
    # More kv heads than the kernel tells apart, more latents than it can fold, sums that do not fit into registers.
    assert not fitting(plans.heads_of(12, 1, 12), 32, 256)
    assert not fitting(plans.heads_of(1, 1, 1), 512, 128)
    assert not fitting(plans.heads_of(32, 1, None), 128, 640)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("heads", "key_ranks", "kv"),
    [
        # A key group's heads, half or a quarter of them.
        ((32, 8), (128, 128), 4),
        ((32, 8), (160, 32), 2),
        ((32, 8), (256, 256), 2),
        ((32, 8), (192,), 2),
        # Those of two or four key groups.
        ((32, 8), (64,) * 8, 4),
        ((8, 8), (128, 64, 96, 128), 4),
        ((8, 8), (64,) * 4, 8),
        # All are as wide as the widest.
        ((8, 8), (192, 128, 64, 32), 2),
    ],
)
def test_a_program_has_as_many_heads_as_its_factors_leave_room_for(heads, key_ranks, kv, bits, monkeypatch):
    monkeypatch.setattr(kind, "block_memory", lambda device: MEMORY)
    shape = Shape(1, *heads, 128, 1, 40, key_ranks, (256,))
    query, *latents, key, value, _, _ = random_call(shape, torch.float16, False)
    latents, _ = quantized(latents, bits, key, value)
    found = kind.kind_of(query, *latents, key, value, None, None)
    assert found.heads.kv == kv
    assert found.groups * kv == heads[1]
    assert found.key_groups == max(1, kv * len(key_ranks) // heads[1])


def test_values_are_read_for_each_key_group_where_one_program_has_no_room_to_read_ahead(monkeypatch):
    monkeypatch.setattr(kind, "block_memory", lambda device: MEMORY)
    shape = Shape(1, 32, 8, 128, 1, 40, (128,) * 4, (256,) * 2)
    query, *latents, key, value, _, _ = random_call(shape, torch.float16, False)
    assert kind.kind_of(query, *latents, key, value, None, None).key_groups == 1
    latents, _ = quantized(latents, 4, key, value)
    assert kind.kind_of(query, *latents, key, value, None, None).key_groups == 2
    # Of one key group's latents and these values a program would read too few bytes per tile.
    narrow = Shape(1, 32, 8, 128, 1, 40, (64,) * 4, (128,) * 2)
    query, *latents, key, value, _, _ = random_call(narrow, torch.float16, False)
    assert kind.kind_of(query, *latents, key, value, None, None).key_groups == 2


def test_key_groups_of_a_program_share_no_columns_of_scores_and_no_products():
    assert fitting(plans.heads_of(8, 1, 4, key_groups=2), 128, 256, bits=4, windows=True)
    assert not fitting(plans.heads_of(4, 1, 4, key_groups=4), 64, 256, bits=4, windows=True)
    assert fitting(plans.heads_of(4, 1, 4, key_groups=4), 64, 256, bits=4)
    heads = plans.heads_of(4, 1, 4, key_groups=4)
    assert not plans.plans_for(heads, 64, (64,), (256,), 4, MEMORY, False, False)
    # Three kv heads of four queries each are in two places of scores, of which one has room left.
    assert not fitting(plans.heads_of(24, 1, 6, key_groups=2), 64, 256)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_of_wide_keys_meet_the_factor_section_by_section(bits):
    ranks = (192, 160)
    latents = torch.randint(0, 2**bits, (7, 192)).double()
    key = LatentProjection(torch.randn(64, sum(ranks), dtype=torch.float64), ranks)
    ordered, _, _ = factor_of_codes(key, 192, bits, torch.float64, True, False, True)
    # As `operand_of` hands codes on: fields of a section's units, one field after the other.
    of_section = [latents[:, start : start + 64][:, unit_order(64, bits)] for start in range(0, 192, 64)]
    for group, up in enumerate(key.up.split(ranks, 1)):
        # Of the second group fewer latents count, whose factor has zeros for the others.
        product = torch.cat(of_section, 1) @ ordered[:, group * 192 : (group + 1) * 192].T
        assert torch.allclose(product, latents[:, : up.shape[1]] @ up.T)


def test_wide_value_groups_of_codes_fit_as_well():
    # Their sums of whole numbers do not, so that they are weighed in fp16.
    for heads, key_rank, value_rank in (
        (plans.heads_of(8, 1, None), 256, 768),
        (plans.heads_of(4, 1, None), 256, 1280),
        (plans.heads_of(8, 1, 8), 64, 640),
        (plans.heads_of(8, 1, 2), 128, 640),
    ):
        assert fitting(heads, key_rank, value_rank, bits=4)
        assert plans.whole_slots(heads, 4, 1)
        assert not plans.whole_slots(heads, 4, -(-value_rank // plans.CHUNK))


@pytest.mark.parametrize(("tiles", "others"), [(1, 1), (64, 2), (1024, 2), (1024, 8), (256, 64), (1024, 200)])
def test_no_other_number_of_parts_would_end_sooner(tiles, others):
    def cost(parts):
        return -(-parts * others // 132) * (-(-tiles // parts) + plans.START)

    parts = plans.parts_of(tiles, others, 132)
    assert 1 <= parts <= min(tiles, plans.MOST_PARTS)
    assert all(cost(parts) <= cost(other) for other in range(1, min(tiles, plans.MOST_PARTS, 528 // others + 1) + 1))


def test_what_the_kernel_cannot_take_is_left_to_the_others():
    query, keys, values, key, value, _, _ = random_call(HOPPER_SHAPES[0], torch.float16, False)
    assert takes(query, keys, values, key, value)
    assert not takes(query.float(), keys, values, key, value)
    joint = LatentProjection(torch.cat(value.up.split(value.ranks, 1)[:1] * 2), value.ranks[:1])
    assert takes(query, keys, values[..., : joint.ranks[0]], key, joint)
    joint_keys = LatentProjection(torch.cat([key.up] * 2)[:, : key.ranks[0]], key.ranks[:1])
    assert not takes(query, keys[..., : key.ranks[0]], values, joint_keys, value)
    for more in (4, 8):
        wider = torch.zeros(*keys.shape[:2], keys.shape[2] + more, dtype=keys.dtype)[..., : keys.shape[2]]
        assert not takes(query, wider, values, key, value)
    wider = torch.zeros(*keys.shape[:2], keys.shape[2] + 16, dtype=keys.dtype)[..., : keys.shape[2]]
    assert takes(query, wider, values, key, value)
    precise = LatentProjection(key.up.float(), key.ranks)
    assert not takes(query, keys, values, precise, value)


def test_biases_and_norms_of_keys_with_one_query_are_left_to_the_others():
    for shape, taken in ((HOPPER_SHAPES[0], True), (HOPPER_SHAPES[5], True), (HOPPER_SHAPES[2], False)):
        query, keys, values, key, value, _, _ = random_call(shape, torch.float16, True)
        assert takes(query, keys, values, key, value) == taken
        key = LatentProjection(key.up, key.ranks)
        assert takes(query, keys, values, key, value, key_norm=RandomNorm(shape.head_dim)) == taken
        assert takes(query, keys, values, key, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_that_the_kernel_cannot_take_are_left_to_the_others(dtype):
    query, *latents, key, value, _, _ = random_call(HOPPER_SHAPES[0], dtype, False)
    codes = {bits: quantized(latents, bits, key, value)[0] for bits in (8, 4, 3, 2)}
    for bits in (8, 4):
        assert takes(query, *codes[bits], key, value)
    for bits in (3, 2):
        assert not takes(query, *codes[bits], key, value)
    assert not takes(query, codes[8][0], codes[4][1], key, value)
    assert not takes(query, codes[8][0], latents[1], key, value)
    symmetric, _ = quantized(latents, 8, key, value, symmetric=True)
    assert takes(query, *symmetric, key, value)
    assert not takes(query, symmetric[0], codes[8][1], key, value)
    # Groups have to begin at multiples of 16 bytes.
    query, *latents, key, value, _, _ = random_call(HOPPER_SHAPES[1], dtype, False)
    for bits, taken in ((8, True), (4, False)):
        assert takes(query, *quantized(latents, bits, key, value)[0], key, value) == taken


def test_calls_whose_places_need_more_than_32_bits_are_left_to_the_others():
    query, keys, values, key, value, _, _ = random_call(HOPPER_SHAPES[0], torch.float16, False)
    table = 1 << (query.shape[3] - 1).bit_length()
    for length, taken in (((1 << 31) // table - 1, True), ((1 << 31) // table, False)):
        # The same token again and again takes no memory.
        many = [latents[:, :1].expand(-1, length, -1) for latents in (keys, values)]
        assert takes(query, *many, key, value) == taken


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
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=name_of)
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "absorbed"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_kernel_reads_codes(shape, dtype, rope, symmetric, bits, monkeypatch):
    if any(rank * bits % 128 for rank in (*shape.key_ranks, *shape.value_ranks)):
        pytest.skip("groups do not begin at multiples of 16 bytes")
    monkeypatch.setattr(hopper, "parts_of", lambda *args: 3)
    query, *latents, key, value, rotation, mask = random_call(shape, getattr(torch, dtype), False)
    packed, held = quantized([latent * 3 + 0.2 for latent in latents], bits, key, value, symmetric=symmetric)
    call = (query, *packed, key, value, rotation if rope else None)
    checked(call, shape, mask, mask, dtype, monkeypatch, held)


@needs_hopper
@torch.no_grad()
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("bits", [8, 4])
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
@pytest.mark.parametrize("bits", [16, 4])
def test_every_plan_computes_the_same(plan, heads, bits, monkeypatch):
    shape = Shape(1, *heads[:2], 128, 1, 1700, (128,), (256,))
    found = plans.heads_of(heads[0], 1, heads[1] if len(heads) == 2 else None)
    if plan not in plans.plans_for(found, 128, (128,), (256,), bits, MEMORY, False, True):
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
@pytest.mark.parametrize("bits", [16, 8, 4])
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
