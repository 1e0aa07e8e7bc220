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
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import add_common_flags, add_evaluated_flags, new_parser, resolve_device, run_script
from utils.evaluation import check_counts, described, free_memory, labels, open_models
from utils.latent import add_latent_flags, apply_latent_flags, check_latent_flags
from utils.sparsity import asked_sparsity, told_if_nothing_drops


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    add_evaluated_flags(parser)
    flag = parser.add_argument
    flag("--probes", default="needle,recall", help="comma-separated: needle, recall (default: both)")
    flag("--lengths", default="256,512,1024", help="tokens of the contexts, comma-separated (default: %(default)s)")
    flag("--depths", type=int, default=5, help="places from the beginning to the end (default: %(default)s)")
    flag("--trials", type=int, default=20, help="questions for every length and depth (default: %(default)s)")
    flag("--batch_size", type=int, default=4, help="contexts at a time (default: %(default)s)")
    add_latent_flags(parser)
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure every way of caching, write the record, draw the heat maps, print the table."""
    import torch

    from palu.evaluate.retrieval import TrialMaker, make_trials, measure_retrieval
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
    sparsity = asked_sparsity(configs[0], args)
    if sparsity is not None:
        sparsity.check_drops_before_decoding()
    check_lengths(configs, models, lengths)
    depths = [place / max(1, args.depths - 1) for place in range(args.depths)]
    trials = [
        make_trials(TrialMaker(tokenizer, args.seed), probes, lengths, depths, args.trials, progress)
        for tokenizer in tokenizers
    ]
    rows = []
    for index, (model, label, mine) in enumerate(variants(models, trials, device, clip_windows, args)):
        row = described(model, label) | {"variant": index}
        with told_if_nothing_drops(model):
            cells = measure_retrieval(model, mine, args.batch_size, progress, f"{label}, retrieval")
        rows += [row | dataclasses.asdict(cell) for cell in cells]
    results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
    write_results(path, results)
    plot_retrieval(results, path.with_suffix(".png"))
    retrieval_table(results)
    console.print(f"record: {path}, plot: {path.with_suffix('.png')}", highlight=False, soft_wrap=True)


def check_flags(args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """Refuse what can be refused from the command line alone; returns probes and lengths."""
    from palu.checkpoint import parse_dtype
    from palu.core.errors import PaluError
    from palu.evaluate.retrieval import PROBES

    check_counts({"--depths": args.depths, "--trials": args.trials, "--batch_size": args.batch_size})
    probes = list(dict.fromkeys(name.strip() for name in args.probes.split(",")))
    for probe in probes:
        if probe not in PROBES:
            raise PaluError(f"--probes: {probe!r} is unknown; use {', '.join(PROBES)}")
    texts = [text.strip() for text in args.lengths.split(",")]
    if not all(text.isdecimal() and int(text) > 0 for text in texts):
        raise PaluError(f"--lengths {args.lengths!r} must be numbers of tokens such as 512,1024")
    parse_dtype(args.dtype)
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
    models: list[str], trials: list[Any], device: str, clip_windows: Any, args: argparse.Namespace
) -> Iterator[tuple[Any, str, Any]]:
    """The models one after the other, each set to one way of caching: a model, its label, its trials."""
    from palu.checkpoint import load_model, parse_dtype
    from palu.models import is_latent
    from utils.console import working

    names = labels(models)
    for index in reversed(range(len(models))):
        with working(f"loading {models[index]}"):
            model = load_model(models[index], parse_dtype(args.dtype), device, args.trust_remote_code)
        if index > 0 or not is_latent(model):
            yield model, names[index], trials[index]
        else:
            apply_latent_flags(model, clip_windows, args)
            for _ in ways_of_caching(model):
                yield model, names[index], trials[index]
        del model
        free_memory()


def ways_of_caching(model: Any) -> Iterator[None]:
    """Set a compressed model to latents as they are, then to its codes, then to its token policy, where it has them."""
    from palu import QuantizationConfig, set_cache

    quantization, sparsity = model.config.latent.quantization, model.config.latent.sparsity
    set_cache(model, QuantizationConfig(), None)
    yield
    set_cache(model, quantization, None)
    if not quantization.is_full:
        yield
    if sparsity is not None:
        set_cache(model, quantization, sparsity)
        yield


if __name__ == "__main__":
    run_script(parse, main)
