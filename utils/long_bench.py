"""LongBench's answers on disk, and tables and plots of its scores."""

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from utils.console import print_table, progress
from utils.results import commit
from utils.side_by_side import bytes_cells, columns, models_of, plot_bars, value_cells

# What changes answers beside model and settings.
PACKAGES = ("palu-kv", "torch", "transformers", "tokenizers", "lm-eval")
DIGITS = 2


def answers_folder(model: Any, tokenizer: Any, label: str, args: Any) -> Path:
    """Where a model's answers are kept: named after everything that they depend on, but for the data set."""
    from palu.calibrate.store import weights_fingerprint

    identity = {
        "config": model.config.to_dict(),
        "ends": model.generation_config.eos_token_id,
        "tokenizer": tokenizer_identity(tokenizer),
        "commit": commit(),
        "weights": weights_fingerprint(model),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "attention": model.config._attn_implementation,
        "versions": {package: metadata.version(package) for package in PACKAGES},
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]
    folder = Path(args.output_dir) / f"{label.replace('/', '--')}_{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tokenizer_identity(tokenizer: Any) -> list[Any]:
    """All that decides which tokens a prompt becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return [rules, tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]


class Answers:
    """A model's answers to one data set, kept on disk.

    Args:
        folder: of the model.
        limit: tokens of a prompt; as_chat: whether it is put into the chat template.
        restart: forget what an earlier run left.
    """

    def __init__(self, folder: Path, task: Any, limit: int, as_chat: bool, restart: bool) -> None:
        from palu.evaluate.prediction_log import PredictionLog

        self.task, self.limit, self.as_chat = task, limit, as_chat
        identity = json.dumps(
            [[task.prompt(row) for row in task.rows], limit, as_chat, task.max_new_tokens, task.stops]
        )
        key = hashlib.sha256(identity.encode()).hexdigest()[:12]
        path = folder / f"{task.name}_{key}.jsonl"
        if restart:
            path.unlink(missing_ok=True)
        self.log = PredictionLog(path)

    def complete(self, model: Any, tokenizer: Any, label: str, limit: int | None) -> dict[int, dict[str, Any]]:
        """Make the answers that are missing among the first `limit` rows; returns those rows' entries."""
        from palu.evaluate.long_bench import answer, prompt_tokens

        wanted = range(len(self.task.rows))[:limit]
        missing = [row for row in wanted if row not in self.log.made]
        for row in progress(missing, f"{label} on {self.task.name}", len(missing)):
            ids, length = prompt_tokens(tokenizer, self.task.prompt(self.task.rows[row]), self.as_chat, self.limit)
            prediction, held = answer(model, tokenizer, ids, self.task)
            entry = {"prediction": prediction, "prompt_tokens": length, "kv_bytes_per_token": held}
            self.log.append(row, entry | {"answers": self.task.rows[row]["answers"]})
        return {row: self.log.made[row] for row in wanted}


def long_bench_table(results: dict[str, Any]) -> None:
    """A line per data set and range of lengths, a column per model; the average and the cache's bytes at the end."""
    rows = results["rows"]
    models = models_of(rows)
    values = {(row["task"], row["lengths"], row["model"]): row for row in rows}
    lines: list[list[Any]] = []
    for task, lengths in dict.fromkeys(key[:2] for key in values):
        found = [values[task, lengths, model] for model in models]
        name = task if lengths == "all" else f"  {lengths}"
        cells = value_cells([row["value"] for row in found], DIGITS)
        lines.append([name, found[0]["metric"], found[0]["rows"], found[0]["cut"], *cells])
    means, held = ([_mean(rows, model, what) for model in models] for what in ("value", "kv_bytes_per_token"))
    average = f"average of {len({row['task'] for row in rows})}"
    lines.append([average, None, None, None, *value_cells(means, DIGITS)])
    lines.append(["KV bytes per token", None, None, None, *bytes_cells(held)])
    names, caption = columns(rows)
    print_table("LongBench, 0 to 100", ["data set", "metric", "rows", "cut", *names], lines, caption)


def _mean(rows: list[dict[str, Any]], model: str, what: str) -> float:
    """Over data sets, each counted once."""
    found = [row[what] for row in rows if row["model"] == model and row["lengths"] == "all"]
    return sum(found) / len(found)


def plot_long_bench(results: dict[str, Any], path: Path) -> None:
    """Bars of every data set's score, models side by side."""
    rows = [row for row in results["rows"] if row["lengths"] == "all"]
    plot_bars(rows, {row["task"]: row["task"] for row in rows}, "score, 0 to 100", path)
