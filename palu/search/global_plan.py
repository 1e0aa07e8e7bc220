"""One budget over layers, keys and values, spent where it saves most of the measured damage.

Damage of a projection is a function of the energy that it drops (`palu.search.damage_curve`). Within a projection,
energies tell its groups apart. The next ranks go, again and again, to the group where a rank saves most,
which is best where all steps are alike: energies fall, so that each rank saves less than the one before.
"""

from collections.abc import Sequence
from typing import NamedTuple

from palu.core.budget import RankBudget
from palu.core.types import Evidence, RankPlan, SiteShape, Statistic, by_projection
from palu.search.base import RankSearch
from palu.search.damage_curve import DamageCurve


class Offer(NamedTuple):
    """What the next allowed rank of a group saves, per rank, and how many ranks it takes."""

    gain: float
    ranks: int
    group: int


class GlobalPlan(RankSearch):
    """Greedy: the largest `(damage(dropped) - damage(dropped - energy of the ranks)) / cost of the ranks` first."""

    needs: frozenset[Statistic] = frozenset({Statistic.DAMAGE})

    def __call__(self, shapes: Sequence[SiteShape], evidence: Evidence, budget: RankBudget) -> RankPlan:
        """The rank of every site."""
        budget.check(shapes)
        dims = {shape.site: shape.group_dim for shape in shapes}
        projections = [
            _Projection([SiteShape(site, dims[site]) for site in sites], evidence, budget)
            for sites in by_projection(dims).values()
        ]
        left = budget.total(shapes) - sum(sum(each.ranks) for each in projections)
        while affordable := [(offer, each) for each in projections for offer in each.offers if offer.ranks <= left]:
            offer, winner = max(affordable, key=lambda pair: pair[0].gain)
            winner.take(offer)
            left -= offer.ranks
        return RankPlan(
            {shape.site: rank for each in projections for shape, rank in zip(each.shapes, each.ranks, strict=True)}
        )


class _Projection:
    """A projection's groups, their ranks so far and what more would save."""

    def __init__(self, shapes: list[SiteShape], evidence: Evidence, budget: RankBudget) -> None:
        site = shapes[0].site
        self.shapes = shapes
        self.damage = DamageCurve(evidence.damage[site.projection])
        self.cost = budget.key_cost if site.side == "key" else 1.0
        self.allowed = [budget.allowed_ranks(shape) for shape in shapes]
        # Energy that is dropped behind every rank.
        energies = [evidence.energy[shape.site] for shape in shapes]
        self.tails = [[*energy.flip(0).cumsum(0).flip(0).tolist(), 0.0] for energy in energies]
        self.ranks = [ranks[0] for ranks in self.allowed]
        self.offers = self._offers()

    def take(self, offer: Offer) -> None:
        self.ranks[offer.group] += offer.ranks
        self.offers = self._offers()

    def _offers(self) -> list[Offer]:
        dropped = sum(tails[rank] for tails, rank in zip(self.tails, self.ranks, strict=True))
        offers = []
        for group, (allowed, rank) in enumerate(zip(self.allowed, self.ranks, strict=True)):
            if rank < allowed[-1]:
                more = allowed[allowed.index(rank) + 1]
                saved = self.tails[group][rank] - self.tails[group][more]
                gain = (self.damage(dropped) - self.damage(dropped - saved)) / ((more - rank) * self.cost)
                offers.append(Offer(gain, more - rank, group))
        return offers
