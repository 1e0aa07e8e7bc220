"""Which calls the decode kernel for GPUs of compute capability 9 takes, and how it lays them out."""

import itertools

import pytest
import torch

from palu.kernels.decode_attention.hopper import kind, plans, sharing
from palu.kernels.decode_attention.hopper.factor import factor_of_codes
from palu.kernels.decode_attention.hopper.operands import section_of
from palu.kernels.decode_attention.spec import HOPPER_SHAPES, Shape
from palu.kernels.latent_scores.factors import unit_order
from palu.kernels.latents import LatentProjection, MixedLatents
from tests.hopper_calls import LLAMA_2, LLAMA_3, MEMORY, fitting
from tests.kernel_calls import RandomNorm, quantized, random_call


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
    assert not plans.plans_for(heads, 64, (64,), (256,), (4, 4), MEMORY, False, False)
    # Three kv heads of four queries each are in two places of scores, of which one has room left.
    assert not fitting(plans.heads_of(24, 1, 6, key_groups=2), 64, 256)


@pytest.mark.parametrize(
    ("heads", "ranks", "kv", "windows"),
    [
        # Folded, where two heads fit, in windows.
        ((4, 4), (320, 256), {16: None, 8: None, 4: 2, 3: None, 2: 2}, (4, 2)),
        # Several queries, one or two heads, of numbers in windows.
        ((16, 4), (320, 256), {16: 1, 8: 1, 4: 2, 3: 1, 2: 2}, (16,)),
        ((32, 8), (512, 384), {16: None, 8: None, 4: 1, 3: 1, 2: 1}, ()),
    ],
)  # fmt: skip
def test_keys_of_many_latents_are_taken_where_that_is_faster(heads, ranks, kv, windows, monkeypatch):
    monkeypatch.setattr(kind, "block_memory", lambda device: MEMORY)
    shape = Shape(1, *heads, 128, 1, 40, ranks[:1], ranks[1:])
    query, *latents, key, value, _, _ = random_call(shape, torch.float16, False)
    for bits, heads_of_program in kv.items():
        found = kind.kind_of(query, *quantized(latents, bits, key, value)[0], key, value, None, None)
        assert (found and found.heads.kv) == heads_of_program
        assert found is None or found.takes_windows == (bits in windows)
    # Few tokens are taken wherever they fit, so that the others are.
    beside = kind.kind_of(query, *latents, key, value, None, None, is_beside=True)
    assert (beside is None) == (ranks[0] == 512)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_of_wide_keys_meet_the_factor_section_by_section(bits):
    ranks = (192, 160)
    wide, section = plans.padded_rank(ranks, bits, "folded"), section_of(bits)
    assert wide == (192 if bits >= 4 else 256)
    latents = torch.randint(0, 2**bits, (7, wide)).double()
    key = LatentProjection(torch.randn(64, sum(ranks), dtype=torch.float64), ranks)
    ordered, _, _ = factor_of_codes(key, wide, bits, torch.float64, True, False, True)
    # As `operand_of` hands codes on: fields of a section's units, one field after the other.
    starts = range(0, wide, section)
    of_section = [latents[:, start : start + section][:, unit_order(section, bits)] for start in starts]
    for group, up in enumerate(key.up.split(ranks, 1)):
        # Of the second group fewer latents count, whose factor has zeros for the others.
        product = torch.cat(of_section, 1) @ ordered[:, group * wide : (group + 1) * wide].T
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
        return -(-parts * others // 132) * (-(-tiles // parts) + sharing.START)

    parts = sharing.parts_of(tiles, others, 132)
    assert 1 <= parts <= min(tiles, sharing.MOST_PARTS)
    assert all(cost(parts) <= cost(other) for other in range(1, min(tiles, sharing.MOST_PARTS, 528 // others + 1) + 1))


@pytest.mark.parametrize(
    ("tiles", "others", "expected"),
    [
        # All programs run at once.
        ((1022, 1, 2), (2, 2, 2), (61, 1, 1)),
        ((64, 64), (2, 2), (32, 32)),
        # Or few of them take a turn more, for a short time.
        ((1022, 1, 2), (8, 8, 8), (14, 1, 1)),
        ((256, 2), (64, 64), (2, 1)),
        ((1024, 1), (64, 64), (2, 1)),
    ],
)
def test_stretches_of_tokens_are_shared_out_so_that_all_end_soon(tiles, others, expected):
    found = sharing.parts_together(tiles, others, (1,) * len(tiles), 132)
    assert found == expected
    assert all(1 <= parts <= own for parts, own in zip(found, tiles, strict=True))
    # Programs that leave two parts each: no more of these than are added up at once.
    twice = sharing.parts_together(tiles, (1,) * len(tiles), (2,) * len(tiles), 132)
    assert 2 * sum(twice) <= sharing.MOST_PARTS


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
    for bits, value_bits in itertools.product(codes, codes):
        assert takes(query, codes[bits][0], codes[value_bits][1], key, value)
    assert not takes(query, codes[8][0], latents[1], key, value)
    for bits in (8, 4, 3, 2):
        mixed = [
            MixedLatents((given[:, :8], each.narrow(1, 8, 985), given[:, -8:]))
            for given, each in zip(latents, codes[bits], strict=True)
        ]
        found = kind.stretches_of(query, *mixed, key, value, None, None)
        assert (found.main, found.kind.bits, found.beside.bits) == (1, bits, 16)
        assert kind.stretches_of(query, mixed[0], codes[bits][1], key, value, None, None) is None
        assert kind.stretches_of(query, codes[bits][0], mixed[1], key, value, None, None) is None
        # One stretch of codes, and no more exact ones than caches have.
        for many in ((0, 1, 1), (0, 0, 1, 0)):
            several = [MixedLatents(tuple(each.stretches[index] for index in many)) for each in mixed]
            assert kind.stretches_of(query, *several, key, value, None, None) is None
    exact = [MixedLatents((each[:, :3], each[:, 3:])) for each in latents]
    assert kind.stretches_of(query, *exact, key, value, None, None).main == 1
    symmetric, _ = quantized(latents, 8, key, value, symmetric=True)
    assert takes(query, *symmetric, key, value)
    assert not takes(query, symmetric[0], codes[8][1], key, value)
    # Groups have to begin at multiples of 16 bytes, those of fewer bits of 4.
    query, *latents, key, value, _, _ = random_call(HOPPER_SHAPES[1], dtype, False)
    for bits, taken in ((8, True), (4, False), (3, False), (2, True)):
        assert takes(query, *quantized(latents, bits, key, value)[0], key, value) == taken


@pytest.mark.parametrize("bits", [3, 2])
def test_codes_whose_first_token_moves_are_copied_in_two_sizes_at_most(bits):
    shape = Shape(1, 8, 4, 128, 1, 40, (96,), (352,))
    query, *latents, key, value, _, _ = random_call(shape, torch.float16, False)
    packed, _ = quantized(latents, bits, key, value)
    # As a sliding window drops tokens at the front.
    found = [
        kind.kind_of(query, *(each.narrow(1, start, 30) for each in packed), key, value, None, None).copies
        for start in range(9)
    ]
    assert found[0] == found[8]
    assert all(len(set(copies)) <= 2 and min(copies) >= 4 for copies in zip(*found, strict=True))


def test_calls_whose_places_need_more_than_32_bits_are_left_to_the_others():
    query, keys, values, key, value, _, _ = random_call(HOPPER_SHAPES[0], torch.float16, False)
    table = 1 << (query.shape[3] - 1).bit_length()
    for length, taken in (((1 << 31) // table - 1, True), ((1 << 31) // table, False)):
        # The same token again and again takes no memory.
        many = [latents[:, :1].expand(-1, length, -1) for latents in (keys, values)]
        assert takes(query, *many, key, value) == taken
