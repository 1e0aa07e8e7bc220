"""Fisher information shares the budget out over projections, whose groups get equal ranks (Palu's default)."""

from collections.abc import Sequence

from palu.core.budget import RankBudget, round_to_budget, share_proportionally
from palu.core.types import Evidence, RankPlan, SiteShape, Statistic, by_projection
from palu.search.base import RankSearch


class FisherUniform(RankSearch):
    """As `fisher`, with a projection's mean score in place of its groups'."""

    needs: frozenset[Statistic] = frozenset({Statistic.FISHER})

    def __call__(self, shapes: Sequence[SiteShape], evidence: Evidence, budget: RankBudget) -> RankPlan:
        """The rank of every site."""
        mean = {
            key: sum(evidence.fisher[site] for site in sites) / len(sites)
            for key, sites in by_projection(shape.site for shape in shapes).items()
        }
        weights = [mean[shape.site.projection] * shape.group_dim for shape in shapes]
        ideal = share_proportionally(weights, [budget.cap(shape) for shape in shapes], budget.total(shapes))
        return round_to_budget(shapes, ideal, budget)
