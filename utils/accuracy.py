"""Tables and plots of accuracies, drawn from result files only."""

from pathlib import Path
from typing import Any

from utils.console import print_table
from utils.side_by_side import bytes_cells, columns, models_of, plot_bars, value_cells

DIGITS = 4


def accuracy_table(results: dict[str, Any]) -> None:
    """A line per task and metric, a column per model; means over tasks and the cache's bytes at the end."""
    rows = results["rows"]
    models = models_of(rows)
    values = {(row["task"], row["metric"], row["filter"], row["model"]): row for row in rows}
    lines: list[list[Any]] = []
    for task, metric, name in dict.fromkeys(key[:3] for key in values):
        found = [values[task, metric, name, model] for model in models]
        spread = found[0]["stderr"]
        cells = value_cells([row["value"] for row in found], DIGITS)
        lines.append([task, _labelled(metric, name), *cells, None if spread is None else f"{spread:.{DIGITS}f}"])
    for (metric, name), tasks in _shared_metrics(rows).items():
        means = [_mean(rows, model, metric, name, tasks) for model in models]
        lines.append([f"mean of {len(tasks)}", _labelled(metric, name), *value_cells(means, DIGITS), None])
    held = [next(row["kv_bytes_per_token"] for row in rows if row["model"] == model) for model in models]
    lines.append(["KV bytes per token", None, *bytes_cells(held), None])
    names, caption = columns(rows)
    print_table(_title(results), ["task", "metric", *names, "stderr"], lines, caption)


def _labelled(metric: str, name: str) -> str:
    """A metric, with lm-eval's filter where there is one."""
    return metric if name == "none" else f"{metric} ({name})"


def _title(results: dict[str, Any]) -> str:
    limit = results["rows"][0]["limit"]
    return "Accuracy" if limit is None else f"Accuracy, limited to {limit:g} rows of each task"


def _shared_metrics(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Metrics and filters of more than one task, with those; groups, which are means of tasks already, do not count."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        tasks = found.setdefault((row["metric"], row["filter"]), [])
        if row["task"] not in tasks and not row["is_group"]:
            tasks.append(row["task"])
    return {key: tasks for key, tasks in found.items() if len(tasks) > 1}


def _mean(rows: list[dict[str, Any]], model: str, metric: str, name: str, tasks: list[str]) -> float:
    wanted = {(model, metric, name, task) for task in tasks}
    keys = ("model", "metric", "filter", "task")
    found = [row["value"] for row in rows if tuple(row[key] for key in keys) in wanted]
    return sum(found) / len(found)


def plot_accuracy(results: dict[str, Any], path: Path) -> None:
    """Bars of every task's first metric, models side by side, with standard errors."""
    ticks: dict[str, str] = {}
    for row in results["rows"]:
        ticks.setdefault(row["task"], f"{row['task']}\n{row['metric']}")
    plot_bars(results["rows"], ticks, "value, with standard error", path)
