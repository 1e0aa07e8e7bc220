"""One budget of bytes over layers, keys and values: every projection's ranks and bits together.

As `palu.search.global_plan`, but the energy that a projection loses is what it drops and what its codes add. Latents
of a Hadamard-turned group are alike, so that a code's mean squared error is their variance times that of normal
numbers, `e(bits, rank)`. With `l_i` the energies that a group keeps, its latents' mean variance is
`sum sqrt(l_i) / rank` and an error of variance 1 in each of them costs `sum sqrt(l_i)` (`palu.core.linalg` scales both
factors by `l_i^(1/4)`), so that codes add `e (sum sqrt(l_i))^2 / rank`.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from palu.core.budget import RankBudget, rounded_up
from palu.core.errors import PaluError
from palu.core.types import Evidence, Projection, RankPlan, Site, SiteShape, Statistic, by_projection
from palu.search.base import RankSearch
from palu.search.damage_curve import DamageCurve, lower_hull, slope

FULL_BYTES = 2
# Nats that losing all energy costs at least, so that bytes are spent where no damage was measured.
LEAST_DAMAGE = 1e-9


class Choice(NamedTuple):
    """A projection's bytes per token, nats per token that they cost, its groups' ranks and its bits."""

    nbytes: int
    damage: float
    ranks: tuple[int, ...]
    bits: int


class GlobalBits(RankSearch):
    """Greedy along every projection's lower convex hull of damage over bytes: the steepest step that fits first."""

    needs: frozenset[Statistic] = frozenset({Statistic.DAMAGE})

    def check(self, shapes: Sequence[SiteShape], budget: RankBudget) -> None:
        """Refuse a budget too small for the smallest ranks with the fewest bits everywhere.

        Raises:
            PaluError: with the smallest ratio that would do.
        """
        ranks: dict[Projection, list[int]] = {}
        for shape in shapes:
            ranks.setdefault(shape.site.projection, []).append(budget.allowed_ranks(shape)[0])
        least = sum(min(budget.codes.nbytes(each, bits) for bits in budget.codes.choices) for each in ranks.values())
        full = FULL_BYTES * sum(shape.group_dim for shape in shapes)
        if least > budget.kept_ratio * full:
            raise PaluError(
                f"param_ratio_target {budget.kept_ratio} leaves {budget.kept_ratio * full:.0f} bytes per token for "
                f"{len(shapes)} groups; use a ratio of at least {rounded_up(least / full):.3f} or a smaller "
                "rank_multiple"
            )

    def energy_lost(self, energy: Tensor, group: SiteShape, budget: RankBudget) -> float:
        """As `RankSearch.energy_lost`, to what is dropped and to codes, with the bits that lose least."""
        share, codes = budget.kept_ratio * FULL_BYTES * len(energy), budget.codes
        ranks = range(1, budget.cap(group) * len(energy) // group.group_dim + 1)
        most = {bits: bisect_right(ranks, share, key=lambda rank: codes.nbytes([rank], bits)) for bits in codes.choices}
        energies = energy.tolist()
        losses = [_lost_at(energies, rank, bits, budget) for bits, rank in most.items() if rank]
        return min(losses, default=energy.sum().item())

    def __call__(self, shapes: Sequence[SiteShape], evidence: Evidence, budget: RankBudget) -> RankPlan:
        """The rank of every site and the bits of every projection."""
        self.check(shapes, budget)
        dims = {shape.site: shape.group_dim for shape in shapes}
        projections = by_projection(dims)
        ways = {key: choices(sites, dims, evidence, budget) for key, sites in projections.items()}
        place = dict.fromkeys(ways, 0)
        left = budget.kept_ratio * FULL_BYTES * sum(dims.values()) + 1e-9 - sum(way[0].nbytes for way in ways.values())
        steps = [(slope(*pair), key, index) for key, way in ways.items() for index, pair in _steps(way)]
        # Along a hull steps only get flatter, so that sorting keeps each projection's in order.
        for _, key, index in sorted(steps):
            step = ways[key][index].nbytes - ways[key][index - 1].nbytes
            if step <= left and place[key] == index - 1:
                place[key], left = index, left - step
        chosen = {key: ways[key][place[key]] for key in ways}
        ranks = {
            site: rank
            for key, sites in projections.items()
            for site, rank in zip(sites, chosen[key].ranks, strict=True)
        }
        return RankPlan(ranks, {key: choice.bits for key, choice in chosen.items()})


def _steps(way: Sequence[Choice]) -> list[tuple[int, tuple[tuple[float, float], tuple[float, float]]]]:
    return [(index, (one[:2], other[:2])) for index, (one, other) in enumerate(pairwise(way), start=1)]


def choices(sites: Sequence[Site], dims: dict[Site, int], evidence: Evidence, budget: RankBudget) -> list[Choice]:
    """The choices for a projection that no mixture of two others beats, by rising bytes and falling damage."""
    measured = DamageCurve(evidence.damage[sites[0].projection])
    total = max(sum(evidence.energy[site].sum().item() for site in sites), 1e-300)
    found = {}
    for bits in budget.codes.choices:
        groups = [
            _lost(evidence.energy[site].tolist(), budget.allowed_ranks(SiteShape(site, dims[site])), bits, budget)
            for site in sites
        ]
        for ranks, energy in _widening(groups):
            damage = measured(energy) + LEAST_DAMAGE * energy / total
            choice = Choice(budget.codes.nbytes(ranks, bits), damage, ranks, bits)
            if choice.nbytes not in found or choice.damage < found[choice.nbytes].damage:
                found[choice.nbytes] = choice
    return [found[nbytes] for nbytes, _ in _falling(lower_hull([found[nbytes][:2] for nbytes in sorted(found)]))]


def _falling(hull: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A hull as far as damage falls."""
    return [hull[0], *(after for before, after in pairwise(hull) if after[1] < before[1])]


def _lost(energy: list[float], allowed: Sequence[int], bits: int, budget: RankBudget) -> dict[int, float]:
    """Energy that a group loses at every allowed rank, to what is dropped and to its codes."""
    return {rank: _lost_at(energy, rank, bits, budget) for rank in allowed}


def _lost_at(energy: list[float], rank: int, bits: int, budget: RankBudget) -> float:
    spread = sum(max(each, 0.0) ** 0.5 for each in energy[:rank])
    return sum(energy[rank:]) + budget.codes.noise(rank, bits) * spread**2 / rank


def _widening(groups: Sequence[dict[int, float]]) -> list[tuple[tuple[int, ...], float]]:
    """From the smallest ranks on (ranks, energy lost), the group that gains most per rank widened first."""
    places, steps = [0] * len(groups), [list(group.items()) for group in groups]
    path = []
    while True:
        now = [step[place] for step, place in zip(steps, places, strict=True)]
        path.append((tuple(rank for rank, _ in now), sum(lost for _, lost in now)))
        gains = {
            index: (now[index][1] - step[place + 1][1]) / (step[place + 1][0] - now[index][0])
            for index, (step, place) in enumerate(zip(steps, places, strict=True))
            if place + 1 < len(step)
        }
        if not gains:
            return path
        places[max(gains, key=gains.get)] += 1
