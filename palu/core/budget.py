"""Exact rank budgets: ideal real-valued ranks in, allowed integer ranks out, the total never above the budget."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from palu.core.errors import PaluError
from palu.core.hadamard import is_reachable
from palu.core.types import RankPlan, SiteShape


def rounded_up(ratio: float) -> float:
    """To three digits, so that the ratio that a message names is enough."""
    return math.ceil(ratio * 1000 - 1e-9) / 1000


class Codes(Protocol):
    """What latents may become."""

    @property
    def choices(self) -> Sequence[int]:
        """Numbers of bits."""
        ...

    def nbytes(self, ranks: Sequence[int], bits: int) -> int:
        """Bytes per token of one projection's groups."""
        ...

    def noise(self, rank: int, bits: int) -> float:
        """Mean squared error of normal latents of a group, over their variance."""
        ...


@dataclass(frozen=True)
class RankBudget:
    """What a search may spend, and on which ranks.

    kept_ratio: kept fraction of the uncompressed cache, in (0, 1].
    rank_multiple: every rank is a multiple of this, or the group's full dimension.
    hadamard: only ranks for which a Hadamard matrix can be constructed.
    key_cost: how much more a search that weighs gain against cost lets a rank of keys cost than one of values; the
        budget counts both the same.
    codes: what a search that chooses bits may choose.
    max_key_rank: the most ranks of a group of keys, None for its dimension; other groups get what it cuts off.
    """

    kept_ratio: float
    rank_multiple: int
    hadamard: bool = False
    key_cost: float = 1.0
    codes: Codes | None = None
    max_key_rank: int | None = None

    def total(self, shapes: Sequence[SiteShape]) -> int:
        """The largest allowed sum of ranks over `shapes`."""
        # The small slack keeps 0.7 * 10 = 7.000000000000001-like products from losing or gaining a rank.
        return math.floor(self.kept_ratio * sum(shape.group_dim for shape in shapes) + 1e-9)

    def cap(self, shape: SiteShape) -> int:
        """The most ranks of a site."""
        if self.max_key_rank is None or shape.site.side != "key":
            return shape.group_dim
        return min(shape.group_dim, self.max_key_rank)

    def allowed_ranks(self, shape: SiteShape) -> list[int]:
        """Ranks that a site may have, ascending.

        Raises:
            PaluError: if there is none.
        """
        cap = self.cap(shape)
        ranks = [*range(self.rank_multiple, shape.group_dim, self.rank_multiple), shape.group_dim]
        allowed = [rank for rank in ranks if rank <= cap and (not self.hadamard or is_reachable(rank))]
        if not allowed:
            named = f"max_key_rank {cap}" if cap < shape.group_dim else f"{cap}"
            turned = " and has a Hadamard matrix" if self.hadamard else ""
            raise PaluError(f"no rank up to {named} is a multiple of rank_multiple {self.rank_multiple}{turned}")
        return allowed

    def check(self, shapes: Sequence[SiteShape]) -> None:
        """Refuse a budget too small for the smallest rank everywhere, or larger than `max_key_rank` lets be spent.

        Raises:
            PaluError: with the smallest ratio that would do, or the largest one.
        """
        least = sum(self.allowed_ranks(shape)[0] for shape in shapes)
        if least > self.total(shapes):
            needed = least / sum(shape.group_dim for shape in shapes)
            raise PaluError(
                f"param_ratio_target {self.kept_ratio} leaves {self.total(shapes)} ranks for {len(shapes)} groups, "
                f"fewer than rank_multiple {self.rank_multiple} each; use a ratio of at least "
                f"{rounded_up(needed):.3f} or a smaller rank_multiple"
            )
        if self.max_key_rank is None:
            return
        most = sum(self.allowed_ranks(shape)[-1] for shape in shapes)
        if most < self.total(shapes):
            share = math.floor(most / sum(shape.group_dim for shape in shapes) * 10000) / 10000
            raise PaluError(
                f"max_key_rank {self.max_key_rank} leaves no more than {share:.4f} of the cache to keep; use a "
                f"param_ratio_target of at most that instead of {self.kept_ratio}, or a larger max_key_rank"
            )


def share_proportionally(weights: Sequence[float], caps: Sequence[int], total: float) -> list[float]:
    """Split `total` in proportion to `weights`, none above its cap; what a cap cuts off goes to the others.

    Weights that are all zero count as equal.
    """
    shares = [0.0] * len(caps)
    open_sites = set(range(len(caps)))
    remaining = total
    while open_sites and remaining > 1e-9:
        weight_sum = sum(weights[i] for i in open_sites)
        if weight_sum > 0:
            wanted = {i: remaining * weights[i] / weight_sum for i in open_sites}
        else:
            wanted = {i: remaining / len(open_sites) for i in open_sites}
        full = [i for i in open_sites if wanted[i] >= caps[i]]
        if not full:
            for i in open_sites:
                shares[i] = wanted[i]
            break
        for i in full:
            shares[i] = float(caps[i])
            remaining -= caps[i]
            open_sites.remove(i)
    return shares


def round_to_budget(shapes: Sequence[SiteShape], ideal: Sequence[float], budget: RankBudget) -> RankPlan:
    """Round ideal ranks down to allowed ones, then give what is left to the largest remainders.

    Every site keeps at least the smallest allowed rank. Equal remainders are served values before keys (the more
    sensitive side), a projection's groups together, spread evenly over the depth.

    Raises:
        PaluError: if not even the smallest ranks fit.
    """
    budget.check(shapes)
    allowed = [budget.allowed_ranks(shape) for shape in shapes]
    # Places in the lists of allowed ranks; a slack as in `RankBudget.total`.
    places = [max(0, bisect_right(ranks, want + 1e-9) - 1) for ranks, want in zip(allowed, ideal, strict=True)]
    total = budget.total(shapes)
    _lower_until_within(places, allowed, ideal, total)
    _raise_largest_remainders(places, allowed, ideal, total, tie_order(shapes))
    return RankPlan({shape.site: allowed[i][places[i]] for i, shape in enumerate(shapes)})


def _spent(places: Sequence[int], allowed: Sequence[Sequence[int]]) -> int:
    return sum(ranks[place] for ranks, place in zip(allowed, places, strict=True))


def _lower_until_within(
    places: list[int], allowed: Sequence[Sequence[int]], ideal: Sequence[float], total: int
) -> None:
    """Lifting sites to the smallest rank may overshoot: take it back where a rank exceeds its ideal most."""
    while _spent(places, allowed) > total:
        lowerable = [i for i, place in enumerate(places) if place > 0]
        loser = max(lowerable, key=lambda i: (allowed[i][places[i]] - ideal[i], allowed[i][places[i]]))
        places[loser] -= 1


def _raise_largest_remainders(
    places: list[int], allowed: Sequence[Sequence[int]], ideal: Sequence[float], total: int, order: Sequence[int]
) -> None:
    """Spend what is left, one step at a time, on the site that is furthest below its ideal rank."""
    left = total - _spent(places, allowed)
    while True:
        steps = {
            i: allowed[i][place + 1] - allowed[i][place]
            for i, place in enumerate(places)
            if place + 1 < len(allowed[i])
        }
        affordable = [i for i, step in steps.items() if step <= left]
        if not affordable:
            return
        winner = max(affordable, key=lambda i: (round(ideal[i] - allowed[i][places[i]], 6), -order[i]))
        places[winner] += 1
        left -= steps[winner]


def tie_order(shapes: Sequence[SiteShape]) -> list[int]:
    """Place of every site when remainders are equal: values first, then layers in golden-ratio order, then groups."""
    golden = (math.sqrt(5) - 1) / 2

    def rule(index: int) -> tuple[bool, float, int]:
        site = shapes[index].site
        return site.side == "key", (site.layer * golden) % 1.0, site.group

    place = [0] * len(shapes)
    for position, index in enumerate(sorted(range(len(shapes)), key=rule)):
        place[index] = position
    return place
