"""Rank searches: one file each, and one line here."""

from palu.core.errors import PaluError
from palu.search.base import RankSearch
from palu.search.fisher import Fisher
from palu.search.fisher_uniform import FisherUniform
from palu.search.global_bits import GlobalBits
from palu.search.global_plan import GlobalPlan
from palu.search.uniform import Uniform

SEARCHES: dict[str, RankSearch] = {
    "uniform": Uniform(),
    "fisher": Fisher(),
    "fisher_uniform": FisherUniform(),
    "global": GlobalPlan(),
    "global_bits": GlobalBits(),
}


def get_search(name: str) -> RankSearch:
    """The search of that name.

    Raises:
        PaluError: listing the known names.
    """
    if name not in SEARCHES:
        raise PaluError(f"search_method {name!r} is unknown; use one of {', '.join(SEARCHES)}")
    return SEARCHES[name]
