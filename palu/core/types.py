"""Small value types that travel down the road: sites, statistics, factors, rank plans."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple

from torch import Tensor

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")
# A layer's k_proj or v_proj.
Projection = tuple[int, Side]


class Statistic(Enum):
    """What a calibration pass can gather."""

    MOMENTS = "moments"
    FISHER = "fisher"
    OUTPUT_FISHER = "output_fisher"
    DAMAGE = "damage"


@dataclass(frozen=True, order=True)
class Site:
    """One head group of one projection: the unit that has a rank of its own."""

    layer: int
    side: Side
    group: int

    @property
    def projection(self) -> Projection:
        """What it is a part of."""
        return self.layer, self.side


def by_projection(sites: Iterable[Site]) -> dict[Projection, list[Site]]:
    """The groups of every projection, in order."""
    projections: dict[Projection, list[Site]] = {}
    for site in sorted(sites):
        projections.setdefault(site.projection, []).append(site)
    return projections


@dataclass(frozen=True)
class SiteShape:
    """A site and the most rank it can use: `group_dim` = group size x head_dim."""

    site: Site
    group_dim: int


@dataclass(frozen=True)
class SiteStats:
    """What is known of a site.

    gram: uncentred second moment `E[x x^T]` of the projection's input, [in_features, in_features], or None when
        no method asked for it.
    metric: what errors of the projection's output cost, as a quadratic form [group_dim, group_dim], or None when they
        all cost the same.
    """

    gram: Tensor | None = None
    metric: Tensor | None = None


class Factors(NamedTuple):
    """Low-rank factors of one site, most important direction first: any prefix is a valid smaller rank."""

    down: Tensor  # [rank, in_features], cached: x @ down.T
    up: Tensor  # [group_dim, rank]
    energy: Tensor  # [rank], what every direction adds to the error when it is dropped

    def truncate(self, rank: int) -> "Factors":
        """The best `rank` directions."""
        return Factors(self.down[:rank], self.up[:, :rank], self.energy[:rank])


@dataclass(frozen=True)
class Evidence:
    """What a rank search goes by.

    fisher: every site's Fisher information, if the search needs it.
    energy: every site's `Factors.energy` at full rank.
    damage: how much the model's predictions change with the energy that a projection drops, if the search needs it:
        pairs (energy of all its groups together, nats per token), by rising energy.
    """

    fisher: Mapping[Site, float] = field(default_factory=dict)
    energy: Mapping[Site, Tensor] = field(default_factory=dict)
    damage: Mapping[Projection, Sequence[tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class RankPlan:
    """The rank of every site, and the bits of every projection's latents where the search chose them."""

    ranks: Mapping[Site, int]
    bits: Mapping[Projection, int] | None = None

    def group_ranks(self, layer: int, side: Side) -> list[int]:
        """Ranks of one projection's groups, in group order."""
        return [self.ranks[site] for site in by_projection(self.ranks)[layer, side]]

    def layer_bits(self) -> dict[Side, list[int]] | None:
        """Bits of each side, for every layer, where the search chose them."""
        if self.bits is None:
            return None
        return {side: [bits for (_, of), bits in sorted(self.bits.items()) if of == side] for side in SIDES}

    def kept_ratio(self, shapes: Sequence[SiteShape]) -> float:
        """Cached latent numbers per token over the uncompressed model's."""
        return sum(self.ranks[shape.site] for shape in shapes) / sum(shape.group_dim for shape in shapes)
