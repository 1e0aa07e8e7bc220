"""Rank plans: exact budgets, caps, proportions."""

import itertools
import random

import pytest
import torch

from palu.core.budget import RankBudget, round_to_budget, share_proportionally
from palu.core.errors import PaluError
from palu.core.types import SIDES, Evidence, Site, SiteShape
from palu.search import SEARCHES, get_search

# What shares out ranks only.
RANK_SEARCHES = [name for name in SEARCHES if name != "global_bits"]


def sites(num_layers, key_groups, value_groups, key_dim=128, value_dim=128):
    return [
        SiteShape(Site(layer, side, group), dim)
        for layer in range(num_layers)
        for side, groups, dim in (("key", key_groups, key_dim), ("value", value_groups, value_dim))
        for group in range(groups)
    ]


def evidence_for(shapes, generator):
    """Random evidence of every kind; damage grows ever faster with the energy that is dropped."""
    energy = {shape.site: torch.rand(shape.group_dim).double().sort(descending=True).values for shape in shapes}
    damage = {}
    for layer, side in dict.fromkeys((site.layer, site.side) for site in energy):
        largest = generator.lognormvariate(0, 2)
        total = sum(each.sum().item() for site, each in energy.items() if (site.layer, site.side) == (layer, side))
        damage[layer, side] = [(share * total, share**1.5 * largest) for share in (0.1, 0.4, 0.9)]
    return Evidence({shape.site: generator.lognormvariate(0, 2) for shape in shapes}, energy, damage)


def damage_of(points, energy):
    """Linear between the points and beyond the last."""
    points = [(0.0, 0.0), *points]
    for (low, less), (high, more) in itertools.pairwise(points):
        value = less + (more - less) * (energy - low) / (high - low)
        if energy <= high:
            break
    return value


@pytest.mark.parametrize("method", RANK_SEARCHES)
@pytest.mark.parametrize("case", range(40))
def test_the_total_never_exceeds_the_budget_and_wastes_less_than_one_step(method, case):
    generator = random.Random(int(torch.randint(1 << 30, ())) + case)
    key_groups, value_groups = generator.choice([(1, 1), (2, 4), (8, 1)])
    shapes = sites(generator.randint(1, 12), key_groups, value_groups, generator.choice([80, 256]), 128)
    evidence = evidence_for(shapes, generator)
    multiple = generator.choice([1, 8, 16, 32])
    ratio = generator.uniform(0.45, 1.0)
    plan = get_search(method)(shapes, evidence, RankBudget(ratio, multiple))
    full = sum(shape.group_dim for shape in shapes)
    total = sum(plan.ranks.values())
    assert total <= ratio * full
    assert plan.kept_ratio(shapes) == total / full
    for shape in shapes:
        rank = plan.ranks[shape.site]
        assert 1 <= rank <= shape.group_dim
        assert rank % multiple == 0 or rank == shape.group_dim
    if total < full:
        assert ratio * full - total < multiple + 1


def test_ratio_one_keeps_everything_whatever_the_multiple():
    shapes = sites(3, 2, 1, 80, 200)
    evidence = evidence_for(shapes, random.Random())
    for method in RANK_SEARCHES:
        plan = get_search(method)(shapes, evidence, RankBudget(1.0, 32))
        assert all(plan.ranks[shape.site] == shape.group_dim for shape in shapes)


def test_ranks_without_a_hadamard_matrix_are_avoided_where_one_is_asked_for():
    shapes = sites(2, 1, 1, 128, 128)
    ideal = [92.0, 116.0, 92.0, 92.0]
    plan = round_to_budget(shapes, ideal, RankBudget(392 / 512, 4, hadamard=True))
    assert not {92, 116} & set(plan.ranks.values())
    assert sum(plan.ranks.values()) <= 392
    assert round_to_budget(shapes, ideal, RankBudget(392 / 512, 4)).ranks[shapes[0].site] == 92
    with pytest.raises(PaluError, match="no rank up to 92 is a multiple of rank_multiple 93 and has a Hadamard matrix"):
        round_to_budget(sites(1, 1, 1, 92, 92), [92.0, 92.0], RankBudget(1.0, 93, hadamard=True))


def test_leftovers_go_to_the_largest_remainders():
    shapes = sites(2, 1, 1)
    plan = round_to_budget(shapes, [33.0, 62.0, 50.0, 40.0], RankBudget(185 / 512, 32))
    assert list(plan.ranks.values()) == [32, 64, 32, 32]


def test_equal_remainders_go_to_values_first_and_whole_projections():
    shapes = sites(4, 2, 2)
    plan = get_search("uniform")(shapes, Evidence(), RankBudget((16 * 32 + 4 * 32) / (16 * 128), 32))
    raised = [site for site, rank in plan.ranks.items() if rank == 64]
    assert len(raised) == 4
    assert {site.side for site in raised} == {"value"}
    assert len({site.layer for site in raised}) == 2


def test_fisher_shares_in_proportion_to_the_scores():
    shapes = sites(2, 1, 1)
    scores = dict(zip((shape.site for shape in shapes), (1.0, 3.0, 2.0, 2.0), strict=True))
    plan = get_search("fisher")(shapes, Evidence(scores), RankBudget(0.5, 1))
    assert list(plan.ranks.values()) == [32, 96, 64, 64]


def test_fisher_uniform_gives_a_projections_groups_equal_ranks():
    shapes = sites(3, 4, 2, 64, 128)
    scores = {shape.site: random.random() for shape in shapes}
    plan = get_search("fisher_uniform")(shapes, Evidence(scores), RankBudget(0.5, 1))
    for layer in range(3):
        for side in ("key", "value"):
            ranks = plan.group_ranks(layer, side)
            assert max(ranks) - min(ranks) <= 1


def test_the_global_plan_does_the_least_damage_that_its_budget_allows():
    shapes = sites(2, 1, 1, 16, 16)
    evidence = evidence_for(shapes, random.Random())
    tails = {site: [energy[rank:].sum().item() for rank in range(17)] for site, energy in evidence.energy.items()}

    def damage(ranks):
        of_sites = zip((shape.site for shape in shapes), ranks, strict=True)
        return sum(damage_of(evidence.damage[site.layer, site.side], tails[site][rank]) for site, rank in of_sites)

    plan = get_search("global")(shapes, evidence, RankBudget(0.5, 4))
    affordable = [ranks for ranks in itertools.product((4, 8, 12, 16), repeat=4) if sum(ranks) <= 32]
    assert damage(plan.ranks.values()) == pytest.approx(min(damage(ranks) for ranks in affordable))


def test_damage_that_levels_off_does_not_hide_what_more_ranks_save():
    shapes = sites(1, 1, 1, 16, 16)
    energy = {shape.site: torch.ones(16).double() for shape in shapes}
    damage = {(0, "key"): [(6.0, 3.0), (10.0, 3.1), (14.0, 3.2)], (0, "value"): [(6.0, 0.3), (10.0, 0.6), (14.0, 1.0)]}
    plan = get_search("global")(shapes, Evidence(energy=energy, damage=damage), RankBudget(0.625, 4))
    assert list(plan.ranks.values()) == [16, 4]


def test_the_global_plan_gives_a_projections_ranks_to_the_groups_whose_energy_falls_later():
    shapes = sites(1, 2, 2, 32, 32)
    flat, steep = torch.full((32,), 1.0).double(), torch.logspace(0, -9, 32).double()
    energy = {shape.site: flat if shape.site.group == 1 else steep for shape in shapes}
    evidence = Evidence(energy=energy, damage={(0, side): [(40.0, 1.0), (80.0, 3.0)] for side in SIDES})
    plan = get_search("global")(shapes, evidence, RankBudget(0.6, 2))
    for side in ("key", "value"):
        first, second = plan.group_ranks(0, side)
        assert first < second


def test_the_dearer_keys_are_the_fewer_ranks_they_get():
    shapes = sites(4, 2, 2, 64, 64)
    evidence = evidence_for(shapes, random.Random())
    kept = []
    for key_cost in (0.1, 1.0, 10.0):
        plan = get_search("global")(shapes, evidence, RankBudget(0.5, 4, key_cost=key_cost))
        assert sum(plan.ranks.values()) == 512
        kept.append(sum(rank for site, rank in plan.ranks.items() if site.side == "key"))
    assert kept[0] >= kept[1] >= kept[2]
    assert kept[0] > kept[2]


@pytest.mark.parametrize("method", RANK_SEARCHES)
def test_keys_have_at_most_so_many_ranks_and_values_get_the_rest(method):
    shapes = sites(3, 2, 2, 64, 64)
    evidence = evidence_for(shapes, random.Random())
    plan = get_search(method)(shapes, evidence, RankBudget(0.6, 8, max_key_rank=20))
    keys = [rank for site, rank in plan.ranks.items() if site.side == "key"]
    assert max(keys) <= 16
    assert sum(plan.ranks.values()) > 0.6 * 12 * 64 - 8
    # All that keys and values may have together, and more.
    plan = get_search(method)(shapes, evidence, RankBudget(0.625, 8, max_key_rank=20))
    assert set(plan.ranks.values()) == {16, 64}
    with pytest.raises(PaluError, match=r"max_key_rank 20 leaves no more than 0\.6250 of the cache"):
        get_search(method)(shapes, evidence, RankBudget(0.8, 8, max_key_rank=20))


@pytest.mark.parametrize("method", ["fisher", "fisher_uniform"])
def test_what_the_bound_on_keys_cuts_off_is_shared_out_in_proportion(method):
    shapes = sites(2, 1, 1, 64, 64)
    scores = {shape.site: 100.0 if shape.site.side == "key" else 1.0 + shape.site.layer for shape in shapes}
    plan = get_search(method)(shapes, Evidence(scores), RankBudget(76 / 256, 1, max_key_rank=20))
    assert [plan.ranks[shape.site] for shape in shapes if shape.site.side == "key"] == [20, 20]
    # 36 of 76 are left, one to two.
    assert sorted(plan.ranks[shape.site] for shape in shapes if shape.site.side == "value") == [12, 24]


def test_what_a_cap_cuts_off_goes_to_the_others():
    shares = share_proportionally([100.0, 1.0, 1.0], [10, 50, 50], 60)
    assert shares == [10, 25, 25]
    assert share_proportionally([0.0, 0.0], [40, 40], 20) == [10, 10]


def test_a_cap_without_a_rank_below_it_is_refused():
    with pytest.raises(PaluError, match="no rank up to max_key_rank 24 is a multiple of rank_multiple 32"):
        get_search("uniform")(sites(1, 1, 1, 64, 64), Evidence(), RankBudget(0.5, 32, max_key_rank=24))


def test_a_ratio_too_small_for_the_multiple_says_what_is_possible():
    shapes = sites(2, 2, 2, 64, 64)
    with pytest.raises(PaluError, match=r"ratio of at least 0\.500 or a smaller rank_multiple"):
        get_search("uniform")(shapes, Evidence(), RankBudget(0.3, 32))


def test_an_unknown_search_lists_the_known_ones():
    with pytest.raises(PaluError, match="uniform, fisher, fisher_uniform, global, global_bits"):
        get_search("best")
