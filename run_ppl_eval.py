"""Perplexity of a model, stock or compressed, and the bytes that its live cache holds per token.

    python run_ppl_eval.py --model_name_or_path demo_ratio-0.5_gs-4-global-fisher-sequential --datasets demo \\
        --baseline assets/demo/model
    python run_ppl_eval.py --model_name_or_path DIR --datasets wikitext2,c4,my-text.txt --seqlen 2048
    python run_ppl_eval.py --model_name_or_path DIR --lt_bits 4 --lt_hadamard --baseline ORIGINAL --plain_bits 4,2

The text is cut into windows of --seqlen tokens that do not overlap; every window starts with an empty cache.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.cli import (
    DATASET_HELP,
    add_common_flags,
    add_evaluated_flags,
    bit_list,
    new_parser,
    resolve_device,
    run_script,
)
from utils.evaluation import check_counts, labels, open_models
from utils.latent import add_latent_flags, apply_latent_flags, check_latent_flags
from utils.sparsity import asked_sparsity, told_if_nothing_drops


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    add_evaluated_flags(parser)
    flag = parser.add_argument
    flag("--datasets", default="wikitext2", help=f"comma-separated: {DATASET_HELP} (default: %(default)s)")
    flag("--seqlen", type=int, default=2048, help="tokens per window (default: %(default)s)")
    flag("--batch_size", type=int, default=1, help="windows at a time (default: %(default)s)")
    flag("--max_windows", type=int, help="only the first windows of each text (default: all)")
    flag(
        "--prefill_chunk",
        type=int,
        help="tokens per forward pass through the cache (default: a whole window, or as many of the newest tokens as "
        "the cache keeps exact)",
    )
    add_latent_flags(parser)
    peer = parser.add_argument_group(
        "plain quantisation of the uncompressed model's cache, to compare with"
    ).add_argument
    peer(
        "--plain_bits",
        type=bit_list,
        help="comma-separated: also measure the stock model with its full keys and values in these bits",
    )
    peer(
        "--plain_key_axis",
        choices=("token", "channel"),
        help="token: keys have a scale per token and head, as values; channel: per channel over 32 tokens, as in KIVI "
        "(default: token)",
    )
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure the model and its baseline on every text, write the record, print the table."""
    import torch

    from palu.calibrate.text import load_text
    from utils.console import console
    from utils.report import perplexity_table, plot_perplexity
    from utils.results import environment, results_path, write_results

    names = check_flags(args)
    models = [args.model_name_or_path] + ([] if args.baseline is None else [args.baseline])
    device = resolve_device(args.device)
    torch.manual_seed(args.seed)
    path = results_path(args.results, "ppl", args.model_name_or_path)
    configs, tokenizers = open_models(models, args.trust_remote_code)
    for config, model in zip(configs, models, strict=True):
        check_model(config, model, args.seqlen)
    clip_windows = check_latent_flags(configs[0], tokenizers[0], models[0], args)
    check_token_policy(configs[0], args)
    check_plain_flags(configs, args)
    texts = {name: load_text(name, "evaluation", args.seed) for name in names}
    rows = []
    for index, (model, label) in enumerate(zip(models, labels(models), strict=True)):

        def prepare(loaded: Any, index: int = index) -> None:
            if index == 0:
                apply_latent_flags(loaded, clip_windows, args)

        rows += measure(model, label, tokenizers[index], texts, args, device, prepare)
    results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
    write_results(path, results)
    plot_perplexity(results, path.with_suffix(".png"))
    perplexity_table(results)
    console.print(f"record: {path}, plot: {path.with_suffix('.png')}", highlight=False, soft_wrap=True)


def check_flags(args: argparse.Namespace) -> list[str]:
    """Refuse what can be refused from the command line alone; returns the names of the texts."""
    from palu.checkpoint import parse_dtype
    from palu.core.errors import PaluError

    names = [name.strip() for name in args.datasets.split(",") if name.strip()]
    counts = {"--batch_size": args.batch_size, "--max_windows": args.max_windows, "--prefill_chunk": args.prefill_chunk}
    check_counts(counts)
    if not names:
        raise PaluError("--datasets is empty")
    parse_dtype(args.dtype)
    return names


def check_model(config: Any, path: str, seqlen: int) -> None:
    """Refuse windows that a model cannot take."""
    from palu.calibrate.windows import check_seqlen
    from palu.core.errors import PaluError

    try:
        check_seqlen(seqlen, config, "--seqlen")
    except PaluError as error:
        raise PaluError(f"{path}: {error}") from error


def check_token_policy(config: Any, args: argparse.Namespace) -> None:
    """Refuse a token policy that would do nothing."""
    from palu.core.errors import PaluError

    sparsity = asked_sparsity(config, args)
    if sparsity is not None:
        sparsity.check_drops_before_decoding()
    if sparsity is not None and (args.prefill_chunk or args.seqlen) >= args.seqlen:
        raise PaluError(
            f"{sparsity.method} drops tokens between forward passes, and a window is one; give --prefill_chunk of "
            f"fewer than the {args.seqlen} tokens of --seqlen"
        )


def check_plain_flags(configs: list[Any], args: argparse.Namespace) -> None:
    """Refuse plain quantisation in bits or of models that it is not for."""
    from palu.core.errors import PaluError
    from palu.models import is_latent
    from palu.nn.plain_cache import PlainQuantizedCache

    stock = [config for config in configs if not is_latent(config)]
    if args.plain_key_axis is not None and args.plain_bits is None:
        raise PaluError("--plain_key_axis does nothing without --plain_bits")
    if not stock and args.plain_bits is not None:
        raise PaluError("--plain_bits quantises full keys and values; pass the original model as --baseline")
    for config in stock:
        for bits in args.plain_bits or []:
            PlainQuantizedCache(config, bits)


def measure(
    path: str,
    label: str,
    tokenizer: Any,
    texts: dict[str, str],
    args: argparse.Namespace,
    device: str,
    prepare: Callable[[Any], None],
) -> list[dict[str, Any]]:
    """One row per text and way of caching for one model.

    Args:
        prepare: changes the loaded model before it is measured.
    """
    from palu.calibrate.windows import consecutive_windows, tokenize
    from palu.checkpoint import load_model, parse_dtype
    from palu.evaluate.perplexity import perplexity
    from palu.models import is_latent
    from palu.nn.plain_cache import PlainQuantizedCache
    from utils.console import progress, working
    from utils.perplexity import row_of

    with working(f"loading {path}"):
        model = load_model(path, parse_dtype(args.dtype), device, args.trust_remote_code)
        windows = {
            name: consecutive_windows(tokenize(tokenizer, text, name, model.config), args.seqlen, name)
            for name, text in texts.items()
        }
    prepare(model)
    variants = [None] + ([] if is_latent(model) else args.plain_bits or [])
    chunk = args.prefill_chunk or (model.config.latent.quantization.window or None if is_latent(model) else None)
    axis = args.plain_key_axis or "token"
    rows = []
    for name, bits in ((name, bits) for name in windows for bits in variants):
        with told_if_nothing_drops(model):
            result = perplexity(
                model,
                windows[name][: args.max_windows],
                args.batch_size,
                progress,
                f"{label} on {Path(name).name}" + (f", plain {bits} bits" if bits else ""),
                chunk,
                bits and (lambda bits=bits: PlainQuantizedCache(model.config, bits, axis)),
            )
        rows.append(row_of(result, model, label, name, bits, axis) | {"prefill_chunk": chunk})
    return rows


if __name__ == "__main__":
    run_script(parse, main)
