"""Decomposition methods: one file each, and one line here."""

from palu.core.errors import PaluError
from palu.decompose.attention import Attention
from palu.decompose.base import Decomposition
from palu.decompose.fisher import Fisher
from palu.decompose.svd import Svd
from palu.decompose.whiten import Whiten

DECOMPOSITIONS: dict[str, Decomposition] = {
    "whiten": Whiten(),
    "query": Attention("key"),
    "output": Attention("value"),
    "attention": Attention("key", "value"),
    "fisher": Fisher("key", "value"),
    "svd": Svd(),
}


def get_decomposition(name: str) -> Decomposition:
    """The method of that name.

    Raises:
        PaluError: listing the known names.
    """
    if name not in DECOMPOSITIONS:
        raise PaluError(f"decompose_method {name!r} is unknown; use one of {', '.join(DECOMPOSITIONS)}")
    return DECOMPOSITIONS[name]
