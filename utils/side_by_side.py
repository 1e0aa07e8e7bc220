"""Scores of models side by side: what the tables and plots of several scripts share."""

from pathlib import Path
from typing import Any

from utils.report import cache_label, headless_pyplot, save_figure


def models_of(rows: list[dict[str, Any]]) -> list[str]:
    """The models of some rows, in order."""
    return list(dict.fromkeys(row["model"] for row in rows))


def named(rows: list[dict[str, Any]], model: str) -> str:
    """A model and how it keeps its cache."""
    return f"{model}, {cache_label(next(row for row in rows if row['model'] == model))}"


def columns(rows: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Short names of a table's columns of values, and the caption that says which model each is."""
    models = models_of(rows)
    names = ["model", "baseline", "diff"] if len(models) > 1 else ["model"]
    return names, "\n".join(f"{name}: {named(rows, model)}" for name, model in zip(names, models, strict=False))


def value_cells(found: list[float], digits: int) -> list[str]:
    """The models' values and, of two, how far the first is from the last."""
    cells = [f"{value:.{digits}f}" for value in found]
    return cells if len(found) == 1 else [*cells, f"{found[0] - found[-1]:+.{digits}f}"]


def bytes_cells(held: list[float]) -> list[str | None]:
    """Bytes per token of the models' caches, none where none was measured, and the first's over the last's."""
    cells = [f"{each:,.0f}" if each else None for each in held]
    if len(held) > 1:
        cells.append(f"{held[0] / held[-1] - 1:+.2%}" if held[-1] else None)
    return cells


def plot_bars(rows: list[dict[str, Any]], ticks: dict[str, str], label: str, path: Path) -> None:
    """Bars of every task's first value, models side by side, with standard errors where there are any.

    Args:
        rows: with `model`, `task`, `value` and, where known, `stderr`.
        ticks: what stands under each task's bars.
        label: of the values.
    """
    plt = headless_pyplot()
    models = models_of(rows)
    figure, axis = plt.subplots(figsize=(max(5.0, 1.2 * len(ticks) + 2), 3.8), layout="constrained")
    width = 0.8 / len(models)
    for place, model in enumerate(models):
        found = [next(row for row in rows if row["task"] == task and row["model"] == model) for task in ticks]
        at = [index + (place - (len(models) - 1) / 2) * width for index in range(len(ticks))]
        errors = [row.get("stderr") or 0 for row in found]
        axis.bar(
            at,
            [row["value"] for row in found],
            width,
            yerr=errors if any(errors) else None,
            capsize=2,
            label=named(rows, model),
        )
    axis.set_xticks(range(len(ticks)), ticks.values())
    axis.set_ylabel(label)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7)
    save_figure(figure, path)
