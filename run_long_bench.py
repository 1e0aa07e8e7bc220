"""LongBench with a model, stock or compressed: greedy answers to long prompts, scored by the benchmark's metrics.

    python run_long_bench.py --model_name_or_path DIR
    python run_long_bench.py --model_name_or_path DIR --datasets qasper,hotpotqa_e --data_dir LongBench/data
    python run_long_bench.py --model_name_or_path DIR --token_sparse_method snapkv --prompt_capacity 1024 --flash2

Prompts, stop rules and metrics are lm-eval's, rows come from the hub or from --data_dir. Every answer is written to
disk as it is made: a run that was interrupted goes on where it stopped when the same command is given again.
"""

import argparse
from pathlib import Path
from typing import Any

from utils.cli import add_common_flags, add_evaluated_flags, new_parser, resolve_device, run_script
from utils.evaluation import check_counts, check_writable, described, free_memory, labels, open_models
from utils.latent import add_latent_flags, apply_latent_flags, check_latent_flags
from utils.sparsity import told_if_nothing_drops


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    add_evaluated_flags(parser)
    flag = parser.add_argument
    flag(
        "--datasets",
        help="comma-separated, any of the 21, with _e those of LongBench-E, or all (default: the eight of Palu's code, "
        "triviaqa, qasper, trec, samsum, lcc, repobench-p, qmsum, multi_news)",
    )
    flag("--data_dir", metavar="DIR", help="a directory with NAME.jsonl for each data set (default: from the hub)")
    flag("--max_length", type=int, help="tokens of a prompt; longer ones are cut in the middle (default: what fits)")
    flag("--limit", type=int, help="only the first rows of each data set (default: all)")
    flag(
        "--chat_template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="force the model's chat template on all prompts, or on none (default: where the tokenizer has one, but "
        "for few-shot and code data sets, as the benchmark does)",
    )
    flag("--flash2", action="store_true", help="FlashAttention 2 for the prompts (needs a GPU and flash-attn)")
    flag(
        "--output_dir",
        default="results/long_bench",
        help="where answers are kept, a folder for every model and setting (default: %(default)s)",
    )
    flag("--restart", action="store_true", help="forget the answers of an earlier run")
    add_latent_flags(parser)
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Answer and score every data set, write the record, print the table."""
    import torch

    from utils.console import console
    from utils.long_bench import long_bench_table, plot_long_bench
    from utils.results import environment, results_path, write_results

    models = [args.model_name_or_path] + ([] if args.baseline is None else [args.baseline])
    device = resolve_device(args.device)
    check_flags(args, device)
    torch.manual_seed(args.seed)
    path = results_path(args.results, "long_bench", args.model_name_or_path)
    configs, tokenizers = open_models(models, args.trust_remote_code)
    clip_windows = check_latent_flags(configs[0], tokenizers[0], models[0], args)
    tasks = open_tasks(args)
    for config, tokenizer, model in zip(configs, tokenizers, models, strict=True):
        check_model(config, tokenizer, model, tasks, args)
    rows: list[dict[str, Any]] = []
    for index, (model, label) in enumerate(zip(models, labels(models), strict=True)):
        loaded = open_model(model, device, args)
        if index == 0:
            apply_latent_flags(loaded, clip_windows, args)
        rows += measure(loaded, tokenizers[index], label, tasks, args)
        del loaded
        free_memory()
        results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
        write_results(path, results)
    plot_long_bench(results, path.with_suffix(".png"))
    long_bench_table(results)
    console.print(f"record: {path}, plot: {path.with_suffix('.png')}", highlight=False, soft_wrap=True)


def check_flags(args: argparse.Namespace, device: str) -> None:
    """Refuse what can be refused from the command line and the machine alone."""
    from transformers.utils import is_flash_attn_2_available

    from palu.checkpoint import parse_dtype
    from palu.core.errors import PaluError

    check_counts({"--max_length": args.max_length, "--limit": args.limit})
    if args.data_dir is not None and not Path(args.data_dir).is_dir():
        raise PaluError(f"--data_dir {args.data_dir} is not a directory")
    check_writable("--output_dir", args.output_dir)
    if args.flash2 and (device == "cpu" or not is_flash_attn_2_available()):
        raise PaluError("--flash2 needs a GPU and the package flash-attn")
    parse_dtype(args.dtype)


def open_tasks(args: argparse.Namespace) -> list[Any]:
    """The data sets with their rows.

    Raises:
        PaluError: naming one that is unknown, or whose rows cannot be had.
    """
    from palu.core.errors import PaluError
    from palu.evaluate.long_bench import DEFAULT_TASKS, load_task, task_names
    from utils.console import progress, working
    from utils.harness import long_bench_manager

    with working("looking for tasks"):
        manager = long_bench_manager()
    known = task_names(manager)
    names = DEFAULT_TASKS if args.datasets is None else [name.strip() for name in args.datasets.split(",")]
    whole = [name for name in known if not name.endswith("_e")]
    names = list(dict.fromkeys(each for name in names for each in (whole if name == "all" else [name])))
    for name in names:
        if name not in known:
            raise PaluError(f"--datasets: {name!r} is no data set of LongBench; use all or {', '.join(known)}")
    data_dir = None if args.data_dir is None else Path(args.data_dir)
    return [load_task(manager, name, data_dir) for name in progress(names, "reading rows", len(names))]


def check_model(config: Any, tokenizer: Any, path: str, tasks: list[Any], args: argparse.Namespace) -> None:
    """Refuse prompts that a model cannot take, and a chat template that it does not have."""
    from palu.core.errors import PaluError

    longest = max(task.max_new_tokens for task in tasks)
    if (args.max_length or 0) > config.max_position_embeddings:
        raise PaluError(
            f"{path}: --max_length {args.max_length} exceeds its {config.max_position_embeddings} positions"
        )
    if longest >= config.max_position_embeddings:
        raise PaluError(
            f"{path}: answers of {longest} tokens leave no room for prompts in its {config.max_position_embeddings} "
            "positions"
        )
    dtype = str(config.dtype) if args.dtype == "auto" else args.dtype
    if args.flash2 and dtype.removeprefix("torch.") not in ("float16", "bfloat16"):
        raise PaluError(f"{path}: --flash2 needs --dtype float16 or bfloat16, not {dtype}")
    if args.chat_template and not tokenizer.chat_template:
        raise PaluError(f"{path}: its tokenizer has no chat template; leave out --chat_template")


def open_model(path: str, device: str, args: argparse.Namespace) -> Any:
    """The model, with the attention that was asked for."""
    from palu.checkpoint import load_model, parse_dtype
    from utils.console import working

    with working(f"loading {path}"):
        attention = "flash_attention_2" if args.flash2 else None
        return load_model(path, parse_dtype(args.dtype), device, args.trust_remote_code, attention)


def measure(model: Any, tokenizer: Any, label: str, tasks: list[Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per data set, and of LongBench-E one per range of lengths too."""
    from palu.evaluate.long_bench import mean_scores
    from utils.long_bench import Answers, answers_folder

    folder = answers_folder(model, tokenizer, label, args)
    rows = []
    for task in tasks:
        positions = model.config.max_position_embeddings - task.max_new_tokens
        limit = min(args.max_length or positions, positions)
        as_chat = bool(tokenizer.chat_template) and not task.plain if args.chat_template is None else args.chat_template
        answers = Answers(folder, task, limit, as_chat, args.restart)
        with told_if_nothing_drops(model):
            made = answers.complete(model, tokenizer, label, args.limit)
        means = mean_scores(task, {row: entry["prediction"] for row, entry in made.items()})
        for lengths, mean in means.items():
            inside = [made[row] for row in mean.rows]
            held = sum(entry["kv_bytes_per_token"] for entry in inside) / len(inside)
            rows.append(
                described(model, label)
                | {"task": task.name, "metric": task.metric, "lengths": lengths, "value": mean.score}
                | {"rows": len(inside), "cut": sum(entry["prompt_tokens"] > limit for entry in inside)}
                | {"max_length": limit, "chat_template": as_chat, "limit": args.limit, "kv_bytes_per_token": held}
                | {"answers": str(answers.log.path)}
            )
    return rows


if __name__ == "__main__":
    run_script(parse, main)
