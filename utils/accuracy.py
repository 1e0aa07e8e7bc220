"""Tables and plots of accuracies, drawn from result files only."""

from pathlib import Path
from typing import Any

from utils.console import print_table
from utils.report import cache_label, headless_pyplot, save_figure


def accuracy_table(results: dict[str, Any]) -> None:
    """A line per task and metric, a column per model; means over tasks and the cache's bytes at the end."""
    rows = results["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    values = {(row["task"], row["metric"], row["filter"], row["model"]): row for row in rows}
    lines: list[list[Any]] = []
    for task, metric, name in dict.fromkeys(key[:3] for key in values):
        found = [values[task, metric, name, model] for model in models]
        label = metric if name == "none" else f"{metric} ({name})"
        lines.append([task, label, *_cells([row["value"] for row in found]), _spread(found[0]["stderr"])])
    for (metric, name), tasks in _shared_metrics(rows).items():
        means = [_mean(rows, model, metric, name, tasks) for model in models]
        label = metric if name == "none" else f"{metric} ({name})"
        lines.append([f"mean of {len(tasks)}", label, *_cells(means), None])
    held = [next(row["kv_bytes_per_token"] for row in rows if row["model"] == model) for model in models]
    cells = [f"{each:,.0f}" if each else None for each in held]
    if len(models) > 1:
        cells.append(f"{held[0] / held[-1] - 1:+.2%}" if held[-1] else None)
    lines.append(["KV bytes per token", None, *cells, None])
    names = ["model", "baseline", "diff"] if len(models) > 1 else ["model"]
    caption = "\n".join(f"{name}: {_named(rows, model)}" for name, model in zip(names, models, strict=False))
    print_table(_title(results), ["task", "metric", *names, "stderr"], lines, caption)


def _title(results: dict[str, Any]) -> str:
    limit = results["rows"][0]["limit"]
    return "Accuracy" if limit is None else f"Accuracy, limited to {limit:g} rows of each task"


def _cells(found: list[float]) -> list[str]:
    """The models' values, and how far the first is from the last."""
    cells = [f"{value:.4f}" for value in found]
    return cells if len(found) == 1 else [*cells, f"{found[0] - found[-1]:+.4f}"]


def _spread(stderr: float | None) -> str | None:
    return None if stderr is None else f"{stderr:.4f}"


def _named(rows: list[dict[str, Any]], model: str) -> str:
    return f"{model}, {cache_label(next(row for row in rows if row['model'] == model))}"


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
    plt = headless_pyplot()
    rows = results["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axis = plt.subplots(figsize=(max(5.0, 1.2 * len(tasks) + 2), 3.8), layout="constrained")
    width = 0.8 / len(models)
    for place, model in enumerate(models):
        found = [next(row for row in rows if row["task"] == task and row["model"] == model) for task in tasks]
        at = [index + (place - (len(models) - 1) / 2) * width for index in range(len(tasks))]
        errors = [row["stderr"] or 0 for row in found]
        axis.bar(at, [row["value"] for row in found], width, yerr=errors, capsize=2, label=_named(rows, model))
    metrics = [next(row["metric"] for row in rows if row["task"] == task) for task in tasks]
    axis.set_xticks(range(len(tasks)), [f"{task}\n{metric}" for task, metric in zip(tasks, metrics, strict=True)])
    axis.set_ylabel("value, with standard error")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7)
    save_figure(figure, path)
