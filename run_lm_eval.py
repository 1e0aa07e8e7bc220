"""Accuracy on tasks of lm-evaluation-harness, and the bytes that the cache held per token of the prompts.

    python run_lm_eval.py --model_name_or_path DIR --baseline ORIGINAL
    python run_lm_eval.py --model_name_or_path DIR --tasks piqa,arc_easy --batch_size auto --limit 200
    python run_lm_eval.py --model_name_or_path DIR --tasks my_task --include_path my_tasks --lt_bits 4 --lt_hadamard
    accelerate launch run_lm_eval.py --model_name_or_path DIR

Tasks, prompts and metrics are lm-eval's; --include_path adds a folder of your own (YAML, with local data if you like).
Under `accelerate launch` every process evaluates its share of the rows.
"""

import argparse
import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.cli import add_common_flags, add_evaluated_flags, new_parser, resolve_device, run_script
from utils.evaluation import check_counts, check_writable, described, free_memory, labels, open_models
from utils.latent import add_latent_flags, apply_latent_flags, check_latent_flags
from utils.sparsity import asked_sparsity, tell_that_nothing_dropped

# Of Palu's table 2.
DEFAULT_TASKS = "openbookqa,hellaswag,piqa,arc_easy,arc_challenge,winogrande"
OUTPUT_DIR = "results/lm_eval"
# What lm-eval seeds the drawing of few-shot examples with, and numpy and torch.
HARNESS_SEED = 1234


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    add_evaluated_flags(parser)
    flag = parser.add_argument
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
    flag(
        "--save_results", action="store_true", help="also write lm-eval's own JSON and all answers, under --output_dir"
    )
    flag("--output_dir", help=f"where to, a folder for every model, setting and list of tasks (default: {OUTPUT_DIR})")
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
    manager, tasks = find_tasks(args.tasks, args.include_path, args.num_fewshot, asked_sparsity(configs[0], args))
    rows: list[dict[str, Any]] = []
    for index, (model, label) in enumerate(zip(models, labels(models), strict=True)):

        def prepare(loaded: Any, index: int = index) -> None:
            if index == 0:
                apply_latent_flags(loaded, clip_windows, args)

        rows += measure(model, label, manager, tasks, device, prepare, args)
        free_memory()
        # Only the first process of several has rows; what is measured so far is kept if the next model fails.
        if rows:
            results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
            write_results(path, results)
    if rows:
        plot_accuracy(results, path.with_suffix(".png"))
        accuracy_table(results)
        console.print(f"record: {path}, plot: {path.with_suffix('.png')}", highlight=False, soft_wrap=True)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what can be refused from the command line alone."""
    from palu.checkpoint import parse_dtype
    from palu.core.errors import PaluError

    if isinstance(args.batch_size, int):
        check_counts({"--batch_size": args.batch_size})
    if args.limit is not None and not (args.limit > 0 and (args.limit < 1 or args.limit.is_integer())):
        raise PaluError(f"--limit {args.limit:g} must be a whole number of rows, or a fraction between 0 and 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise PaluError(f"--num_fewshot {args.num_fewshot} must be 0 or more")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise PaluError(f"--include_path {args.include_path} is not a directory")
    if args.output_dir is not None and not args.save_results:
        raise PaluError("--output_dir does nothing without --save_results")
    check_writable("--output_dir", args.output_dir or OUTPUT_DIR)
    parse_dtype(args.dtype)


def find_tasks(asked: str, include_path: str | None, shots: int | None, sparsity: Any) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names of the tasks, whose data sets are there.

    Raises:
        PaluError: naming a task that is unknown, whose data cannot be had, that has fewer than `shots` examples, or
            that has nothing to drop tokens of.
    """
    import difflib

    from palu.core.errors import PaluError
    from utils.console import working
    from utils.harness import load_tasks, task_manager

    names = [name.strip() for name in asked.split(",") if name.strip()]
    if not names:
        raise PaluError("--tasks is empty")
    folders = [] if include_path is None else [include_path]
    with working("loading tasks and their data"):
        # A folder's own tasks are enough where they are all that is asked for, and need no others.
        manager = task_manager(*folders, defaults=False)
        loaded = {}
        if all(manager.match_tasks([name]) for name in names):
            loaded = load_tasks(manager, matched_tasks(manager, names), must=False)
        if not loaded:
            manager = task_manager(*folders)
            for name in names:
                if not manager.match_tasks([name]):
                    close = difflib.get_close_matches(name, manager.all_tasks, n=3)
                    hint = f"; close: {', '.join(close)}" if close else "; lm_eval ls tasks lists all"
                    raise PaluError(f"--tasks: {name!r} is no task of lm-eval or --include_path{hint}")
            loaded = load_tasks(manager, matched_tasks(manager, names), must=True)
    check_examples(loaded, shots)
    if sparsity is not None:
        check_policy(sparsity, {name: task.OUTPUT_TYPE for name, task in loaded.items()})
    return manager, matched_tasks(manager, names)


def matched_tasks(manager: Any, names: list[str]) -> list[str]:
    """The tasks that names and patterns stand for, each once."""
    return list(dict.fromkeys(task for name in names for task in manager.match_tasks([name])))


def check_examples(tasks: dict[str, Any], shots: int | None) -> None:
    """Refuse more examples before a question than a task has."""
    from palu.core.errors import PaluError

    for name, task in tasks.items() if shots else ():
        # lm-eval gives no examples to tasks whose own number is 0; those without a YAML file keep their own rules.
        if task.get_config("num_fewshot") == 0 or not hasattr(task, "fewshot_cfg"):
            continue
        sampler = getattr(task, "sampler", None)
        there = 0 if sampler is None else len(sampler.fewshot_docs())
        # lm-eval draws one more where the question itself may be among them.
        there -= task.fewshot_cfg.split == task.config.test_split
        if shots > there:
            raise PaluError(f"--num_fewshot {shots}: task {name} has {max(0, there)} examples for a question")


def check_policy(sparsity: Any, types: dict[str, str]) -> None:
    """Refuse tasks, by their types, of which a token policy would drop nothing."""
    from palu.core.errors import PaluError

    for name, kind in types.items():
        if kind == "loglikelihood_rolling":
            raise PaluError(f"task {name} scores whole texts, of which a token policy drops nothing")
        if kind != "generate_until":
            sparsity.check_drops_before_decoding()


def measure(
    path: str,
    label: str,
    manager: Any,
    tasks: list[str],
    device: str,
    prepare: Callable[[Any], None],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row per task and metric of one model; none in all processes but the first.

    Args:
        prepare: changes the loaded model before it is measured.
    """
    import lm_eval

    from palu.evaluate.harness import PaluLM
    from utils.console import working
    from utils.harness import save_harness_results

    with working(f"loading {path}"):
        lm = PaluLM(
            path,
            device=device,
            dtype=args.dtype,
            batch_size=args.batch_size,
            trust_remote_code=args.trust_remote_code,
        )
    prepare(lm.model)
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        device=str(lm.device),
        limit=args.limit,
        log_samples=args.save_results,
        # Those of lm-eval where the seed is 0, so that it draws the same few-shot examples.
        random_seed=args.seed,
        numpy_random_seed=(HARNESS_SEED + args.seed) % 2**32,
        torch_random_seed=HARNESS_SEED + args.seed,
        fewshot_random_seed=HARNESS_SEED + args.seed,
    )
    bytes_per_token, has_dropped = lm.kv_bytes_per_token(), lm.has_dropped_tokens()
    if found is None:
        return []
    if lm.drops_tokens and not has_dropped:
        tell_that_nothing_dropped()
    model = described(lm.model, label)
    if args.save_results:
        save_harness_results(found, model, Path(args.output_dir or OUTPUT_DIR))
    return accuracy_rows(found, model | {"kv_bytes_per_token": bytes_per_token}, args.limit)


def accuracy_rows(found: dict[str, Any], model: dict[str, Any], limit: float | None) -> list[dict[str, Any]]:
    """One row per task, or group of tasks, and metric.

    Raises:
        PaluError: if there is none.
    """
    from palu.core.errors import PaluError

    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
                continue
            stderr = values.get(f"{metric}_stderr,{name}")
            row = model | {"task": task, "metric": metric, "filter": name, "value": float(value)}
            row |= {"stderr": float(stderr) if isinstance(stderr, numbers.Real) else None, "limit": limit}
            row |= {"rows": values.get("sample_len"), "num_fewshot": found["n-shot"].get(task)}
            rows.append(row | {"is_group": bool(found.get("group_subtasks", {}).get(task))})
    if not rows:
        raise PaluError("these tasks have no metric that is a number")
    return rows


if __name__ == "__main__":
    run_script(parse, main)
