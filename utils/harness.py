"""lm-eval for the scripts: its tasks, offline where there is no hub, and its results as files."""

import functools
import hashlib
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


def load_tasks(manager: Any, names: list[str], must: bool) -> dict[str, Any]:
    """Tasks by name, with their data.

    Args:
        must: refuse what cannot be loaded; else nothing is returned then.

    Raises:
        PaluError: with the reason.
    """
    from palu.core.errors import PaluError

    try:
        return manager.load(list(names))["tasks"]
    except Exception as error:  # data set loaders and task code raise whatever they like
        if not must:
            return {}
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PaluError(f"--tasks {','.join(names)} cannot be loaded: {reason.strip()}") from error


def save_harness_results(found: dict[str, Any], model: dict[str, Any], directory: Path) -> None:
    """Write lm-eval's own JSON, `results.json`, and every task's answers, `samples_TASK.jsonl`.

    They lie in a folder named after the model, how it keeps its cache and what was asked of lm-eval, whose earlier
    content they replace.
    """
    from lm_eval.utils import handle_non_serializable

    from palu.checkpoint import whole_directory

    # Tasks with their few-shot examples and limits: other questions' answers are kept beside these.
    asked = {task: [found["n-shot"].get(task), found["n-samples"].get(task)] for task in sorted(found["results"])}
    key = hashlib.sha256(json.dumps([model, asked], sort_keys=True).encode()).hexdigest()[:8]
    folder = directory / f"{model['model'].replace('/', '--')}_{key}"
    samples = found.pop("samples", {})
    dump = functools.partial(json.dumps, default=handle_non_serializable, ensure_ascii=False)
    with whole_directory(folder) as partial:
        for task, rows in samples.items():
            lines = "".join(f"{dump(row)}\n" for row in rows)
            (partial / f"samples_{task}.jsonl").write_text(lines, encoding="utf-8")
        (partial / "results.json").write_text(dump(found | {"palu": model}, indent=2) + "\n", encoding="utf-8")
