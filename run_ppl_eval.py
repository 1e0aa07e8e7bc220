"""Perplexity of a model, stock or compressed, and the bytes that its live cache holds per token.

    python run_ppl_eval.py --model_name_or_path demo_ratio-0.5_gs-4-fisher_uniform-whiten --datasets demo \\
        --baseline assets/demo/model
    python run_ppl_eval.py --model_name_or_path DIR --datasets wikitext2,c4,my-text.txt --seqlen 2048

The text is cut into windows of --seqlen tokens that do not overlap; every window starts with an empty cache.
"""

import argparse
from pathlib import Path
from typing import Any

from utils.cli import (
    DATASET_HELP,
    add_common_flags,
    add_latent_flags,
    latent_settings,
    new_parser,
    resolve_device,
    run_script,
)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="directory or hub name of the model to measure")
    parser.add_argument("--baseline", metavar="DIR", help="a model to measure beside it, usually the original")
    parser.add_argument(
        "--datasets", default="wikitext2", help=f"comma-separated: {DATASET_HELP} (default: %(default)s)"
    )
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="windows at a time (default: %(default)s)")
    parser.add_argument("--max_windows", type=int, help="only the first windows of each text (default: all)")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    add_latent_flags(parser)
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure the model and its baseline on every text, write the record, print the table."""
    import torch

    from palu.calibrate.text import load_text
    from palu.checkpoint import check_weight_files, load_config, load_tokenizer, parse_dtype
    from palu.core.errors import PaluError
    from utils.console import console
    from utils.report import perplexity_table, plot_perplexity
    from utils.results import environment, results_path, write_results

    names = [name.strip() for name in args.datasets.split(",") if name.strip()]
    for flag, value in (("--batch_size", args.batch_size), ("--max_windows", args.max_windows)):
        if value is not None and value < 1:
            raise PaluError(f"{flag} {value} must be at least 1")
    if not names:
        raise PaluError("--datasets is empty")
    models = [args.model_name_or_path] + ([] if args.baseline is None else [args.baseline])
    device = resolve_device(args.device)
    parse_dtype(args.dtype)
    torch.manual_seed(args.seed)
    path = results_path(args.results, "ppl", args.model_name_or_path)
    tokenizers = []
    for index, model in enumerate(models):
        config = load_config(model, args.trust_remote_code)
        check_model(config, model, args.seqlen)
        if index == 0:
            check_latent_flags(config, model, args)
        tokenizers.append(load_tokenizer(model, args.trust_remote_code))
        check_weight_files(model)
    texts = {name: load_text(name, "evaluation", args.seed) for name in names}
    rows = []
    for index, (model, label, tokenizer) in enumerate(zip(models, labels(models), tokenizers, strict=True)):
        rows += measure(model, label, tokenizer, texts, args, device, latent_flags=index == 0)
    results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
    write_results(path, results)
    plot_perplexity(results, path.with_suffix(".png"))
    perplexity_table(results)
    console.print(f"record: {path}, plot: {path.with_suffix('.png')}", highlight=False, soft_wrap=True)


def labels(models: list[str]) -> list[str]:
    """Directory names; whole paths where two are equal; a model beside itself is marked as the baseline."""
    names = [Path(model).resolve().name if Path(model).exists() else model for model in models]
    if len(set(names)) < len(names):
        names = list(models)
    if len(set(names)) < len(names):
        names[1] += " (baseline)"
    return names


def check_latent_flags(config: Any, path: str, args: argparse.Namespace) -> None:
    """Refuse latent flags for a model that has no latents, and values that are not allowed."""
    from palu.core.errors import PaluError
    from palu.models import is_latent

    flags = {name: value for name, value in vars(args).items() if name.startswith("lt_")}
    given = [name for name, value in flags.items() if value is not None and value is not False]
    if is_latent(config):
        latent_settings(args, config.latent.quantization)
    elif given:
        raise PaluError(f"{path} is not a compressed model; --{given[0]} needs one")


def check_model(config: Any, path: str, seqlen: int) -> None:
    """Refuse windows that a model cannot take."""
    from palu.calibrate.windows import check_seqlen
    from palu.core.errors import PaluError

    try:
        check_seqlen(seqlen, config, "--seqlen")
    except PaluError as error:
        raise PaluError(f"{path}: {error}") from error


def measure(
    path: str,
    label: str,
    tokenizer: Any,
    texts: dict[str, str],
    args: argparse.Namespace,
    device: str,
    latent_flags: bool,
) -> list[dict[str, Any]]:
    """One row per text for one model; `latent_flags`: whether the --lt_ flags are meant for it."""
    from palu.calibrate.windows import consecutive_windows, tokenize
    from palu.checkpoint import load_model, parse_dtype
    from palu.evaluate.perplexity import perplexity
    from utils.console import progress, working

    with working(f"loading {path}"):
        model = load_model(path, parse_dtype(args.dtype), device, args.trust_remote_code)
        if latent_flags:
            apply_latent_flags(model, args)
        windows = {
            name: consecutive_windows(tokenize(tokenizer, text, name, model.config), args.seqlen, name)[
                : args.max_windows
            ]
            for name, text in texts.items()
        }
    rows = []
    for name, batch in windows.items():
        result = perplexity(model, batch, args.batch_size, progress, f"{label} on {Path(name).name}")
        rows.append(
            {
                "model": label,
                "dataset": name,
                "seqlen": result.seqlen,
                "windows": result.windows,
                "tokens": result.tokens,
                "perplexity": result.perplexity,
                "kv_bytes_per_token": result.kv_bytes_per_token,
                "kept_ratio": kept_ratio(model.config),
                **latent_bits(model),
                "dtype": str(model.dtype).removeprefix("torch."),
            }
        )
    return rows


def apply_latent_flags(model: Any, args: argparse.Namespace) -> None:
    """Set how the cache stores latents, as the flags say."""
    from palu import fold_hadamard, set_quantization
    from palu.models import is_latent

    if not is_latent(model):
        return
    set_quantization(model, latent_settings(args, model.config.latent.quantization))
    if args.lt_hadamard:
        fold_hadamard(model)


def latent_bits(model: Any) -> dict[str, Any]:
    """Bits of a cached number, keys and values apart, and whether latents are Hadamard-turned."""
    from palu.models import is_latent

    full = model.dtype.itemsize * 8
    if not is_latent(model):
        return {"bits": full, "value_bits": full, "hadamard": False}
    latent = model.config.latent
    key, value = (
        full if bits == 16 else bits for bits in (latent.quantization.key_bits, latent.quantization.value_bits)
    )
    return {"bits": key, "value_bits": value, "hadamard": latent.hadamard}


def kept_ratio(config: Any) -> float:
    """Cached numbers per token over the uncompressed model's: 1 for a stock model."""
    from palu.config import head_dim
    from palu.models import is_latent

    if not is_latent(config):
        return 1.0
    full = 2 * config.num_key_value_heads * head_dim(config) * config.num_hidden_layers
    return sum(sum(layer.key) + sum(layer.value) for layer in config.latent.layers) / full


if __name__ == "__main__":
    run_script(parse, main)
