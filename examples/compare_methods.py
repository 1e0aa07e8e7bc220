"""Compare ways of compressing one model: perplexity against the bytes of its live cache, as a table, JSON and a plot.

    python examples/compare_methods.py                                       # the bundled demo model and texts
    python examples/compare_methods.py --model_id DIR --calib_dataset wikitext2 --datasets wikitext2,c4 \\
        --methods fisher_uniform+whiten,global+fisher+sequential --ratios 0.3,0.5 --lt_bits 16,4 --lt_hadamard

A method is a search and a decomposition, as --search_method and --decompose_method of compress.py, and may go on with
a --value_group_size of its own, with regroup, with sequential and with adapt and its share, as in
global+fisher+all+sequential+adapt=0.1. The original is measured too, and with its full keys and values in --plain_bits.
KL is the mean divergence of predictions from the original's, which tells methods apart that perplexity does not. The
search global_bits chooses bits itself, whatever --lt_bits says. Only the record and the plot are written.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import DATASET_HELP, add_common_flags, bit_list, group_size, new_parser, resolve_device, run_script
from utils.compression import asked_compression, default_text


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("--model_id", help="directory or hub name of a stock model (default: the bundled demo model)")
    flag(
        "--methods",
        default="fisher_uniform+whiten,global+fisher+sequential",
        help="comma-separated (default: %(default)s)",
    )
    flag("--ratios", type=ratio_list, default=[0.3, 0.5, 0.7], help="comma-separated kept fractions (0.3,0.5,0.7)")
    flag("--lt_bits", type=bit_list, default=[16], help="comma-separated bits of latents (default: 16)")
    flag("--lt_hadamard", action="store_true", help="turn latents by Hadamard matrices")
    flag("--plain_bits", type=bit_list, default=[8, 4, 3, 2], help="comma-separated, of full keys and values (8,4,3,2)")
    flag("--head_group_size", type=group_size, default=4, help="kv heads that share a latent (default: %(default)s)")
    flag("--value_group_size", type=group_size, help="the same for values (default: as --head_group_size)")
    flag(
        "--key_cost", type=float, default=1.0, help="as of compress.py, of methods that search with global (default: 1)"
    )
    flag("--max_key_rank", type=int, help="as of compress.py (default: no such limit)")
    flag("--rank_multiple", type=int, default=32, help="ranks are multiples of this (default: %(default)s)")
    flag("--calib_dataset", help=f"{DATASET_HELP} (default: wikitext2; demo for the demo model)")
    flag("--n_whiten_calib_samples", type=int, default=256, help="windows for the moments (default: %(default)s)")
    flag("--calib_seqlen", type=int, default=1024, help="tokens in each (default: %(default)s)")
    flag("--n_fisher_calib_samples", type=int, default=32, help="windows for Fisher (default: %(default)s)")
    flag("--datasets", help="comma-separated texts to measure on (default: wikitext2; demo for the demo model)")
    flag("--seqlen", type=int, default=2048, help="tokens per window (default: %(default)s)")
    flag("--max_windows", type=int, help="only the first windows of each text (default: all)")
    flag("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    add_common_flags(parser)
    return parser.parse_args(argv)


def ratio_list(text: str) -> list[float]:
    """Argparse type of comma-separated kept fractions, each once."""
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers such as 0.3,0.5") from None


def main(args: argparse.Namespace) -> None:
    """Compress and measure everything, write the record, print the table."""
    import torch

    from palu.calibrate.text import DEMO_ASSETS
    from palu.calibrate.windows import check_seqlen
    from palu.checkpoint import check_weight_files, load_config, load_model, load_tokenizer, parse_dtype
    from palu.core.errors import PaluError
    from palu.pipeline import check_compression, check_moments
    from utils.console import console, working
    from utils.report import perplexity_table, plot_front
    from utils.results import environment, results_path, write_results

    source = str(DEMO_ASSETS / "model") if args.model_id is None else args.model_id
    configs = compression_configs(args)
    dtype, device = parse_dtype(args.dtype), resolve_device(args.device)
    path = results_path(args.results, "compare", "demo" if args.model_id is None else source)
    datasets = default_text(args.model_id) if args.datasets is None else args.datasets
    names = [name.strip() for name in datasets.split(",") if name.strip()]
    if not names:
        raise PaluError(f"--datasets must name a text: {DATASET_HELP}")
    if args.max_windows is not None and args.max_windows < 1:
        raise PaluError(f"--max_windows {args.max_windows} must be at least 1")
    model_config = load_config(source, args.trust_remote_code)
    check_bits(args, model_config)
    for (method, _), config in configs.items():
        with naming(method):
            check_compression(model_config, config)
    check_weight_files(source)
    torch.manual_seed(args.seed)
    check_seqlen(args.seqlen, model_config, "--seqlen")
    with working("reading the texts and the model"):
        tokenizer = load_tokenizer(source, args.trust_remote_code)
        windows = {name: evaluation_windows(tokenizer, name, model_config, args) for name in names}
        calibration = drawn_windows(tokenizer, model_config, list(configs.values()))
        for config in configs.values():
            check_moments(config, calibration)
        saved = dtype if dtype != "auto" else (model_config.dtype or torch.float32)
        model = load_model(source, torch.float32 if device == "cpu" else saved, device, args.trust_remote_code)
    rows = list(measure(model, configs, calibration, windows, saved, args))
    results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
    write_results(path, results)
    plot_front(results, path.with_suffix(".png"))
    perplexity_table(results)
    console.print(f"record: {path}, plot: {path.with_suffix('.png')}", highlight=False, soft_wrap=True)


def compression_configs(args: argparse.Namespace) -> dict[tuple[str, float], Any]:
    """The library's CompressionConfig of every method and ratio."""
    from palu.core.errors import PaluError

    methods = {name: method_settings(name) for name in filter(None, map(str.strip, args.methods.split(",")))}
    if not methods:
        raise PaluError("--methods must name a method, such as global+fisher")
    searches = {asked["search_method"] for asked in methods.values()}
    configs = {}
    for method, asked in methods.items():
        # Where no method takes it, it is refused as ever.
        if "global" in searches and asked["search_method"] != "global":
            asked["key_cost"] = 1.0
        for ratio in args.ratios:
            with naming(method):
                configs[method, ratio] = asked_compression(args, param_ratio_target=ratio, **asked)
    return configs


@contextmanager
def naming(method: str) -> Iterator[None]:
    """Name the method in what is said of its settings."""
    from palu.core.errors import PaluError

    try:
        yield
    except PaluError as error:
        raise PaluError(f"--methods {method!r}: {error}") from None


def method_settings(method: str) -> dict[str, Any]:
    """What a method's name asks for, as fields of CompressionConfig."""
    from palu.core.errors import PaluError

    search, *more = method.split("+")
    if not more:
        raise PaluError(
            f"--methods {method!r} must be SEARCH+DECOMPOSITION, such as global+fisher, with +VALUE_GROUP_SIZE and "
            "+regroup, +sequential and +adapt=SHARE behind it if wanted"
        )
    asked: dict[str, Any] = {"search_method": search, "decompose_method": more[0]}
    for word in more[1:]:
        try:
            name, value = _setting(word)
        except argparse.ArgumentTypeError as error:
            raise PaluError(f"--methods {method!r}: {error}") from None
        if asked.get(name) is not None:
            raise PaluError(f"--methods {method!r} has two {name}")
        asked[name] = value
    return {"sequential": False} | asked


def _setting(word: str) -> tuple[str, Any]:
    """The field of CompressionConfig that a word of a method's name sets, and to what.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    if word in ("regroup", "sequential"):
        return word, True
    name, _, share = word.partition("=")
    if name == "adapt":
        try:
            return name, float(share)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} needs a share, as in adapt=0.1") from None
    try:
        return "value_group_size", group_size(word)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor 'regroup', 'sequential' or 'adapt=' and a share") from None


def check_bits(args: argparse.Namespace, model_config: Any) -> None:
    """Refuse numbers of bits that there are no codes of."""
    from palu import QuantizationConfig
    from palu.nn.plain_cache import PlainQuantizedCache

    for bits in args.lt_bits:
        QuantizationConfig(key_bits=bits, value_bits=bits)
    for bits in args.plain_bits:
        PlainQuantizedCache(model_config, bits)


def evaluation_windows(tokenizer: Any, name: str, model_config: Any, args: argparse.Namespace) -> Any:
    """Token windows of a text, int64 [windows, seqlen]."""
    from palu.calibrate.text import load_text
    from palu.calibrate.windows import consecutive_windows, tokenize

    tokens = tokenize(tokenizer, load_text(name, "evaluation", args.seed), name, model_config)
    return consecutive_windows(tokens, args.seqlen, name)[: args.max_windows]


def drawn_windows(tokenizer: Any, model_config: Any, configs: list[Any]) -> Any:
    """The calibration windows that all methods need together."""
    from palu.calibrate.windows import CalibrationWindows
    from palu.pipeline import calibration_windows, statistics_needed

    kinds = {statistics_needed(config): config for config in configs}
    drawn = [calibration_windows(tokenizer, model_config, config) for config in kinds.values()]
    moments, fisher = ([getattr(each, name) for each in drawn] for name in ("moments", "fisher"))
    return CalibrationWindows(
        *(next((each for each in found if each is not None), None) for found in (moments, fisher))
    )


def measure(
    model: Any, configs: dict[Any, Any], calibration: Any, windows: dict[str, Any], dtype: Any, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row per text of every method, ratio and number of bits, then of the original."""
    from palu import QuantizationConfig, compress, set_quantization
    from utils.console import progress

    original = copied(model, dtype)
    with tempfile.TemporaryDirectory() as cache:
        for (method, ratio), config in configs.items():
            # Statistics are the same for all ratios.
            compression = compress(model, config=config, windows=calibration, cache_dir=Path(cache), progress=progress)
            compressed = copied(compression.model, dtype)
            own = compressed.config.latent.quantization
            given = [QuantizationConfig(key_bits=bits, value_bits=bits) for bits in args.lt_bits]
            for quantization in given if own.layer_bits is None else [own]:
                set_quantization(compressed, quantization)
                yield from rows_of(compressed, original, f"{method} {ratio:g}", method, windows, None)
            # Before the next one is made.
            del compression, compressed
    for bits in (None, *args.plain_bits):
        yield from rows_of(original, original, "original", None, windows, bits)


def copied(model: Any, dtype: Any) -> Any:
    """A model with its weights in a number format, a copy if they are not; RoPE's frequencies stay as loaded."""
    import copy

    if model.dtype == dtype:
        return model
    copy_of_it = copy.deepcopy(model)
    for parameter in copy_of_it.parameters():
        parameter.data = parameter.data.to(dtype)
    return copy_of_it


def rows_of(
    model: Any, original: Any, label: str, method: str | None, windows: dict[str, Any], bits: int | None
) -> Iterator[dict[str, Any]]:
    """One row per text; bits: of plain quantisation."""
    from palu.evaluate.perplexity import perplexity
    from palu.nn.plain_cache import PlainQuantizedCache
    from utils.console import progress
    from utils.perplexity import row_of

    new_cache = None if bits is None else lambda: PlainQuantizedCache(model.config, bits)
    for name, tokens in windows.items():
        shown = f"{label} on {Path(name).name}" + (f", plain {bits} bits" if bits else "")
        result = perplexity(model, tokens, 1, progress, shown, None, new_cache, original)
        yield row_of(result, model, label, name, bits, "token") | {"method": method}


if __name__ == "__main__":
    run_script(parse, main)
