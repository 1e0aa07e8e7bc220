"""How long-running library functions report progress without printing anything themselves."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

# progress(items, description, total) yields the items unchanged and may draw a bar meanwhile.
Progress = Callable[[Iterable, str, int], Iterable]


def silent(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """The default progress: draws nothing."""
    yield from items
