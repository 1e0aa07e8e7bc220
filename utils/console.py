"""The terminal: log lines, progress bars, tables."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Item = TypeVar("Item")
console = Console()
error_console = Console(stderr=True, soft_wrap=True)


def configure(verbose: bool) -> None:
    """Log warnings (everything with `verbose`) to stderr; silence other libraries' progress bars."""
    import transformers

    handler = RichHandler(console=error_console, show_path=False, show_time=verbose, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("palu").setLevel(logging.DEBUG if verbose else logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    if not verbose:
        transformers.utils.logging.set_verbosity_error()


def print_error(message: str) -> None:
    """One line on stderr."""
    error_console.print(f"error: {message}", markup=False, highlight=False)


def progress(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield the items with a bar on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=error_console) as bar:
        yield from bar.track(items, total=total, description=_shortened(description))


def _shortened(text: str, width: int = 34) -> str:
    """The beginning and the end of a long text, so that bar and time keep their place on the line."""
    return text if len(text) <= width else f"{text[: width // 2 - 1]}..{text[-width // 2 + 1 :]}"


def working(description: str) -> AbstractContextManager[Any]:
    """A spinner for work whose length is not known."""
    return error_console.status(description)


def print_table(title: str, columns: list[str], rows: Iterable[Iterable[Any]], caption: str | None = None) -> None:
    """One table on stdout; numbers right-aligned."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # nine columns of figures fit into 80
    )
    rows = [[_cell(value) for value in row] for row in rows]
    for index, name in enumerate(columns):
        numeric = all(_is_number(row[index]) for row in rows)
        # Long names are folded, so that the figures beside them stay whole.
        table.add_column(name, no_wrap=numeric, overflow="fold", justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*row)
    # Outside the table, where a long name is not broken at the table's width.
    console.print(f"\n{title}", style="bold", highlight=False, soft_wrap=True)
    console.print(table)
    if caption:
        console.print(caption, highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:,.2f}" if isinstance(value, float) else str(value))
    )


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(" ", "").lstrip("+-").rstrip("%").replace(".", "", 1).isdigit()
