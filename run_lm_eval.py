"""Accuracy on tasks of lm-evaluation-harness, and the bytes that the cache held per token of the prompts.

    python run_lm_eval.py --model_name_or_path DIR --baseline ORIGINAL
    python run_lm_eval.py --model_name_or_path DIR --tasks piqa,arc_easy --batch_size auto --limit 200
    python run_lm_eval.py --model_name_or_path DIR --tasks my_task --include_path my_tasks --lt_bits 4 --lt_hadamard
    accelerate launch run_lm_eval.py --model_name_or_path DIR

Tasks, prompts and metrics are lm-eval's; --include_path adds a folder of your own (YAML, with local data if you like).
Under `accelerate launch` every process evaluates its share of the rows.
"""

import argparse
from pathlib import Path
from typing import Any

from utils.cli import add_common_flags, new_parser, resolve_device, run_script
from utils.evaluation import check_counts, described, labels, open_models
from utils.latent import add_latent_flags, apply_latent_flags, check_latent_flags

# Of Palu's table 2.
DEFAULT_TASKS = "openbookqa,hellaswag,piqa,arc_easy,arc_challenge,winogrande"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("--model_name_or_path", required=True, help="directory or hub name of the model to measure")
    flag("--baseline", metavar="DIR", help="a model to measure beside it, usually the original")
    flag("--tasks", default=DEFAULT_TASKS, help="comma-separated names, groups or patterns (default: %(default)s)")
    flag("--include_path", metavar="DIR", help="a folder with more tasks")
    flag(
        "--batch_size",
        type=batch_size,
        default=8,
        help="rows at a time; auto: as many as fit; auto:N: found anew N times (default: %(default)s)",
    )
    flag("--limit", type=float, help="rows of each task, or the fraction of them if below 1 (default: all)")
    flag("--num_fewshot", type=int, help="examples before each question (default: as the task says)")
    flag("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    flag(
        "--save_results", action="store_true", help="also write lm-eval's own JSON and all answers, under --output_dir"
    )
    flag("--output_dir", default="results/lm_eval", help="where to, one folder a model (default: %(default)s)")
    add_latent_flags(parser)
    add_common_flags(parser)
    return parser.parse_args(argv)


def batch_size(text: str) -> int | str:
    """Argparse type of a batch size: a number, `auto` or `auto:N`."""
    name, colon, times = text.partition(":")
    if name == "auto" and (not colon or times.isdigit()):
        return text
    if text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto nor auto:N")


def main(args: argparse.Namespace) -> None:
    """Evaluate the model and its baseline, write the record, print the table."""
    import torch

    from utils.accuracy import accuracy_table, plot_accuracy
    from utils.console import console
    from utils.results import environment, results_path, write_results

    models = [args.model_name_or_path] + ([] if args.baseline is None else [args.baseline])
    check_flags(args)
    device = resolve_device(args.device)
    torch.manual_seed(args.seed)
    path = results_path(args.results, "lm_eval", args.model_name_or_path)
    configs, tokenizers = open_models(models, args.trust_remote_code)
    clip_windows = check_latent_flags(configs[0], tokenizers[0], models[0], args)
    manager, tasks = find_tasks(args.tasks, args.include_path)
    rows: list[dict[str, Any]] = []
    for model, label in zip(models, labels(models), strict=True):
        lm = open_harness(model, device, args)
        if model is models[0] and not rows:
            apply_latent_flags(lm.model, clip_windows, args)
        found = evaluate(lm, manager, tasks, label, args)
        # Only the first process of several has the results.
        if found is not None:
            rows += accuracy_rows(found, lm, label, args.limit)
    if not rows:
        return
    results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
    write_results(path, results)
    plot_accuracy(results, path.with_suffix(".png"))
    accuracy_table(results)
    console.print(f"record: {path}, plot: {path.with_suffix('.png')}", highlight=False, soft_wrap=True)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what can be refused from the command line alone."""
    from palu.checkpoint import parse_dtype
    from palu.core.errors import PaluError

    if isinstance(args.batch_size, int):
        check_counts({"--batch_size": args.batch_size})
    if args.limit is not None and not (args.limit > 0 and (args.limit < 1 or args.limit == int(args.limit))):
        raise PaluError(f"--limit {args.limit:g} must be a whole number of rows, or a fraction between 0 and 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise PaluError(f"--num_fewshot {args.num_fewshot} must be 0 or more")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise PaluError(f"--include_path {args.include_path} is not a directory")
    if args.save_results and Path(args.output_dir).is_file():
        raise PaluError(f"--output_dir {args.output_dir} is a file")
    parse_dtype(args.dtype)


def find_tasks(asked: str, include_path: str | None) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names of the tasks, whose data sets are there.

    Raises:
        PaluError: naming a task that is unknown, or whose data cannot be had.
    """
    import difflib

    from palu.core.errors import PaluError
    from utils.console import working
    from utils.harness import task_manager

    names = [name.strip() for name in asked.split(",") if name.strip()]
    folders = [] if include_path is None else [include_path]
    with working("looking for tasks"):
        # A folder's own tasks are enough where they are all that is asked for.
        manager = task_manager(*folders, defaults=False)
        if not all(manager.match_tasks([name]) for name in names):
            manager = task_manager(*folders)
    tasks: list[str] = []
    for name in names:
        matched = manager.match_tasks([name])
        if not matched:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; close: {', '.join(close)}" if close else "; lm_eval ls tasks lists all"
            raise PaluError(f"--tasks: {name!r} is no task of lm-eval or --include_path{hint}")
        tasks += [task for task in matched if task not in tasks]
    if not tasks:
        raise PaluError("--tasks is empty")
    for task in tasks:
        with working(f"loading the data of {task}"):
            try:
                manager.load([task])
            except Exception as error:  # data set loaders and task code raise whatever they like
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise PaluError(f"task {task}: its data cannot be loaded: {reason.strip()}") from error
    return manager, tasks


def open_harness(model: str, device: str, args: argparse.Namespace) -> Any:
    """The model as lm-eval sees it."""
    from palu.evaluate.harness import PaluLM
    from utils.console import working

    with working(f"loading {model}"):
        return PaluLM(
            model,
            device=device,
            dtype=args.dtype,
            batch_size=args.batch_size,
            trust_remote_code=args.trust_remote_code,
        )


def evaluate(lm: Any, manager: Any, tasks: list[str], label: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """lm-eval's results, saved if that is asked for; None in all processes but the first."""
    import lm_eval

    from utils.harness import save_harness_results

    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        device=str(lm.device),
        limit=args.limit,
        log_samples=args.save_results,
        random_seed=args.seed,
        numpy_random_seed=args.seed % 2**32,
        torch_random_seed=args.seed,
        fewshot_random_seed=args.seed,
    )
    if found is not None and args.save_results:
        save_harness_results(found, Path(args.output_dir) / label.replace("/", "--"))
    return found


def accuracy_rows(found: dict[str, Any], lm: Any, label: str, limit: float | None) -> list[dict[str, Any]]:
    """One row per task and metric."""
    rows = []
    for task, values in found["results"].items():
        metrics = {key.partition(","): value for key, value in values.items() if isinstance(value, int | float)}
        for (metric, _, name), value in metrics.items():
            if not name or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{name}")
            row = described(lm.model, label) | {"task": task, "metric": metric, "filter": name, "value": value}
            row |= {"stderr": stderr if isinstance(stderr, int | float) else None, "limit": limit}
            row |= {"rows": values.get("sample_len"), "num_fewshot": found["n-shot"].get(task)}
            rows.append(row | {"kv_bytes_per_token": lm.kv_bytes_per_token})
    return rows


if __name__ == "__main__":
    run_script(parse, main)
