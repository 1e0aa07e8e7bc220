"""Does a model still find a fact in its context once the cache is latents, codes, or short of tokens? A heat map.

    python examples/measure_retrieval.py --model_name_or_path DIR --baseline ORIGINAL
    python examples/measure_retrieval.py --model_name_or_path DIR --baseline ORIGINAL --lt_bits 4 --lt_hadamard \\
        --token_sparse_method snapkv --prompt_capacity_rate 0.25 --lengths 512,1024,2048 --trials 40

Two probes, made from the seed for any tokenizer: `needle`, one sentence that matters among many that do not, and
`recall`, the value of one of many keys. A trial is won if the right answer is likelier than all of seven distractors.
Measured are the baseline, the model with latents as they are, with codes if --lt_bits is given (or saved with the
checkpoint), and with a token policy if --token_sparse_method is.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import add_common_flags, new_parser, resolve_device, run_script
from utils.evaluation import check_counts, free_memory, labels, open_models
from utils.latent import add_latent_flags, apply_latent_flags, check_latent_flags
from utils.perplexity import described

PROBES = ("needle", "recall")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("--model_name_or_path", required=True, help="directory or hub name of the compressed model")
    flag("--baseline", metavar="DIR", help="a model to measure beside it, usually the original")
    flag("--probes", default="needle,recall", help="comma-separated: needle, recall (default: both)")
    flag("--lengths", default="256,512,1024", help="tokens of the contexts, comma-separated (default: %(default)s)")
    flag("--depths", type=int, default=5, help="places from the beginning to the end (default: %(default)s)")
    flag("--trials", type=int, default=20, help="questions for every length and depth (default: %(default)s)")
    flag("--batch_size", type=int, default=4, help="contexts at a time (default: %(default)s)")
    flag("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    add_latent_flags(parser)
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure every way of caching, write the record, draw the heat maps, print the table."""
    import torch

    from palu.evaluate.retrieval import TrialMaker, measure_retrieval
    from utils.console import console, progress
    from utils.results import environment, results_path, write_results
    from utils.retrieval import plot_retrieval, retrieval_table

    models = [args.model_name_or_path] + ([] if args.baseline is None else [args.baseline])
    probes, lengths = check_flags(args)
    device = resolve_device(args.device)
    torch.manual_seed(args.seed)
    path = results_path(args.results, "retrieval", args.model_name_or_path)
    configs, tokenizers = open_models(models, args.trust_remote_code)
    clip_windows = check_latent_flags(configs[0], tokenizers[0], models[0], args)
    check_lengths(configs, models, lengths)
    depths = [place / max(1, args.depths - 1) for place in range(args.depths)]
    makers = [TrialMaker(tokenizer, args.seed) for tokenizer in tokenizers]
    for maker in makers:
        # Lengths too short for a question show here: each trial fills its length with other words.
        for probe, depth, number in itertools.product(probes, depths, range(args.trials)):
            maker.trial(probe, lengths[0], depth, number)
    rows = []
    for model, label, maker in variants(models, makers, device, clip_windows, args):
        row = described(model, label)
        cells = measure_retrieval(
            model, maker, probes, lengths, depths, args.trials, args.batch_size, progress, f"{label}, retrieval"
        )
        rows += [row | {"variant": len(rows) // len(cells)} | dataclasses.asdict(cell) for cell in cells]
    results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
    write_results(path, results)
    plot_retrieval(results, path.with_suffix(".png"))
    retrieval_table(results)
    console.print(f"record: {path}, plot: {path.with_suffix('.png')}", highlight=False, soft_wrap=True)


def check_flags(args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """Refuse what can be refused from the command line alone; returns probes and lengths."""
    from palu.checkpoint import parse_dtype
    from palu.core.errors import PaluError

    check_counts({"--depths": args.depths, "--trials": args.trials, "--batch_size": args.batch_size})
    probes = list(dict.fromkeys(name.strip() for name in args.probes.split(",")))
    for probe in probes:
        if probe not in PROBES:
            raise PaluError(f"--probes: {probe!r} is unknown; use {', '.join(PROBES)}")
    texts = [text.strip() for text in args.lengths.split(",")]
    if not all(text.isdigit() and int(text) > 0 for text in texts):
        raise PaluError(f"--lengths {args.lengths!r} must be numbers of tokens such as 512,1024")
    parse_dtype(args.dtype)
    if args.skip_prefill_compression:
        raise PaluError("--skip_prefill_compression drops nothing before decoding, and answers are scored without any")
    return probes, sorted({int(text) for text in texts})


def check_lengths(configs: list[Any], models: list[str], lengths: list[int]) -> None:
    """Refuse contexts that a model cannot take."""
    from palu.core.errors import PaluError

    for config, model in zip(configs, models, strict=True):
        if lengths[-1] >= config.max_position_embeddings:
            raise PaluError(
                f"{model}: --lengths {lengths[-1]} and an answer exceed its {config.max_position_embeddings} positions"
            )


def variants(
    models: list[str], makers: list[Any], device: str, clip_windows: Any, args: argparse.Namespace
) -> Iterator[tuple[Any, str, Any]]:
    """The models one after the other, each set to one way of caching: a model, its label, its maker of trials."""
    from palu.checkpoint import load_model, parse_dtype
    from palu.models import is_latent
    from utils.console import working

    names = labels(models)
    for index in reversed(range(len(models))):
        with working(f"loading {models[index]}"):
            model = load_model(models[index], parse_dtype(args.dtype), device, args.trust_remote_code)
        if index > 0 or not is_latent(model):
            yield model, names[index], makers[index]
        else:
            apply_latent_flags(model, clip_windows, args)
            for _ in ways_of_caching(model):
                yield model, names[index], makers[index]
        del model
        free_memory()


def ways_of_caching(model: Any) -> Iterator[None]:
    """Set a compressed model to latents as they are, then to its codes, then to its token policy, where it has them."""
    from palu import QuantizationConfig, set_quantization, set_token_sparsity

    quantization, sparsity = model.config.latent.quantization, model.config.latent.sparsity
    set_token_sparsity(model, None)
    set_quantization(model, QuantizationConfig())
    yield
    set_quantization(model, quantization)
    if not quantization.is_full:
        yield
    if sparsity is not None:
        set_token_sparsity(model, sparsity)
        yield


if __name__ == "__main__":
    run_script(parse, main)
