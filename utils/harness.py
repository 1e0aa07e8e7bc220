"""lm-eval for the scripts: its tasks, offline where there is no hub, and its results as files."""

import json
import os
from pathlib import Path
from typing import Any


def task_manager(*folders: str | Path, defaults: bool = True) -> Any:
    """The tasks of lm-eval in some folders, with all that it comes with (reading these takes seconds) or without."""
    from palu.core.hub import hub_reachable

    if not hub_reachable():
        # Read when the libraries are imported; without them every data set would be asked for again and again.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=defaults)


def long_bench_manager() -> Any:
    """LongBench's tasks alone."""
    from importlib.util import find_spec

    return task_manager(Path(find_spec("lm_eval.tasks").origin).with_name("longbench"), defaults=False)


def save_harness_results(found: dict[str, Any], folder: Path) -> None:
    """Write lm-eval's own JSON, `results.json`, and every task's answers, `samples_TASK.jsonl`."""
    from lm_eval.utils import handle_non_serializable

    samples = found.pop("samples", {})
    folder.mkdir(parents=True, exist_ok=True)
    lines = {
        f"samples_{task}.jsonl": (json.dumps(row, default=handle_non_serializable, ensure_ascii=False) for row in rows)
        for task, rows in samples.items()
    }
    lines["results.json"] = [json.dumps(found, indent=2, default=handle_non_serializable, ensure_ascii=False)]
    for name, texts in lines.items():
        partial = folder / f".{name}.{os.getpid()}.partial"
        try:
            partial.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
            os.replace(partial, folder / name)
        finally:
            partial.unlink(missing_ok=True)
