"""Compress a model's KV cache: calibrate, search ranks, factor, write a Hugging Face checkpoint.

    python compress.py                                        # the bundled demo model, half of its cache kept
    python compress.py --model_id meta-llama/Llama-2-7b-hf --param_ratio_target 0.5 --calib_dataset wikitext2
    python compress.py --model_id ./my-model --calib_dataset my-text.jsonl --head_group_size all   # J-LRD

Load the result with transformers' AutoModelForCausalLM after `import palu`, or with trust_remote_code=True.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.cli import DATASET_HELP, add_common_flags, group_size, new_parser, resolve_device, run_script
from utils.compression import asked_compression
from utils.latent import add_latent_flags


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    add_model_flags(parser.add_argument_group("model and output").add_argument)
    add_rank_flags(parser.add_argument_group("ranks").add_argument)
    add_calibration_flags(parser.add_argument_group("calibration").add_argument)
    add_latent_flags(parser, evaluates=False)
    add_common_flags(parser)
    return parser.parse_args(argv)


def add_model_flags(flag: Callable[..., Any]) -> None:
    """Which model, where to."""
    flag("--model_id", help="directory or hub name: Llama, Mistral, Qwen2 or Qwen3 (default: the bundled demo model)")
    flag("--output_dir", help="the new checkpoint (default: {MODEL}_ratio-{r}_gs-{gs}-{search}-{decompose}-sequential)")
    flag("--overwrite", action="store_true", help="replace an existing output directory")
    flag(
        "--dump_huggingface_model",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the checkpoint; with --no-..., only search and report the ranks",
    )
    flag(
        "--dtype",
        default="auto",
        help="number format of the new checkpoint: auto (the original's), float32, bfloat16, float16; "
        "a GPU also computes in it, a CPU always in float32",
    )
    flag("--max_shard_size", default="5GB", help="largest weight file (default: %(default)s)")


def add_rank_flags(flag: Callable[..., Any]) -> None:
    """How much to keep, and where."""
    flag("--param_ratio_target", type=float, default=0.5, help="KEPT fraction of the cache (default: %(default)s)")
    flag(
        "--head_group_size",
        type=group_size,
        default=4,
        help="kv heads that share a latent: a number, or all; 1 is M-LRD, all is J-LRD (default: %(default)s)",
    )
    flag("--value_group_size", type=group_size, help="the same for values (default: as --head_group_size)")
    flag(
        "--palu",
        action="store_true",
        help="Palu's own methods: --search_method fisher_uniform --decompose_method whiten --no-sequential",
    )
    flag(
        "--search_method",
        help="uniform; fisher, fisher_uniform: by the gradients of weights; global: ranks go where they save most of "
        "the measured change of predictions, over layers, keys and values; global_bits: ranks and bits together, "
        "--param_ratio_target is then the fraction of a 16-bit cache's bytes, of which 8 bits, the most it gives, "
        "take half (default: global)",
    )
    flag(
        "--key_cost",
        type=float,
        default=1.0,
        help="with global: how much more a rank of keys costs than one of values; keys are rebuilt in every decoding "
        "step, values are not (default: %(default)s)",
    )
    flag(
        "--max_key_rank",
        type=int,
        help="at most so many latents per group of keys, which are rebuilt in every decoding step; the other groups, "
        "values' above all, get what this cuts off (default: no such limit)",
    )
    flag(
        "--decompose_method",
        help="svd; whiten: least error of keys and values on the text; query: keys' errors weighed by the queries "
        "that meet them; output: values' by what o_proj makes of them; attention: both; fisher: both, and by what they "
        "change in the predictions (default: fisher)",
    )
    flag(
        "--regroup",
        action="store_true",
        help="put the kv heads side by side whose keys lose least together, layer by layer; decoding does not change",
    )
    flag(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="fit every o_proj again, layer after layer, to what compressed attention hands it: less is lost, the "
        "cache stays as it is (default: on)",
    )
    flag(
        "--adapt",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="at last, tune the output projections on the calibration text: perplexity falls on texts like it, and "
        "tells less about how much of the original is kept; SHARE is how much further predictions may drift from the "
        "original's (their divergence), from 0 to 1, 0.1 for a tenth (default: 0, off)",
    )
    flag(
        "--fuse_values",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fold the values' up factors into o_proj in the layers where that makes the weights smaller (default: on)",
    )
    flag("--rank_multiple", type=int, default=32, help="ranks are multiples of this (default: %(default)s)")


def add_calibration_flags(flag: Callable[..., Any]) -> None:
    """Which text, how much of it."""
    flag("--calib_dataset", help=f"{DATASET_HELP} (default: wikitext2; demo for the demo model)")
    flag("--n_whiten_calib_samples", type=int, default=256, help="windows for the moments (default: %(default)s)")
    flag("--calib_seqlen", type=int, default=1024, help="tokens in each (default: %(default)s)")
    flag("--n_fisher_calib_samples", type=int, default=32, help="windows for Fisher (default: %(default)s)")
    flag("--fisher_seqlen", type=int, help="tokens in each (default: 1024, at most --calib_seqlen)")
    flag(
        "--n_probe_calib_samples",
        type=int,
        default=4,
        help="how many of the windows for the moments global and global_bits measure with (default: %(default)s)",
    )
    flag("--use_cache", action="store_true", help="keep calibration statistics on disk and reuse them")
    flag("--cache_dir", help="where (default: $PALU_CACHE or ~/.cache/palu)")


def main(args: argparse.Namespace) -> None:
    """Check what was asked, compress, write, report."""
    import torch

    from palu import compress
    from palu.calibrate.store import default_cache_dir
    from palu.calibrate.text import DEMO_ASSETS
    from palu.checkpoint import check_shard_size, check_weight_files, load_config, parse_dtype, prepare_output
    from palu.pipeline import check_compression
    from utils.console import progress
    from utils.results import results_path

    source = str(DEMO_ASSETS / "model") if args.model_id is None else args.model_id
    config = compression_config(args)
    dtype, device = parse_dtype(args.dtype), resolve_device(args.device)
    check_shard_size(args.max_shard_size)
    label = checkpoint_name("demo" if args.model_id is None else Path(args.model_id).resolve().name, config)
    output = None
    if args.dump_huggingface_model:
        output = prepare_output(label if args.output_dir is None else args.output_dir, args.overwrite, [source])
    results = results_path(args.results, "compress", output.name if output else label)
    cache_dir = Path(args.cache_dir) if args.cache_dir is not None else default_cache_dir()
    model_config = load_config(source, args.trust_remote_code)
    check_compression(model_config, config)
    check_weight_files(source)
    if args.use_cache:
        cache_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    saved_dtype = dtype if dtype != "auto" else (model_config.dtype or torch.float32)
    model, tokenizer, windows = load_inputs(source, model_config, config, saved_dtype, output, device, args)
    compression = compress(
        model, tokenizer, config, windows=windows, cache_dir=cache_dir if args.use_cache else None, progress=progress
    )
    compression.model.to(saved_dtype)
    report(args, config, compression, tokenizer, output, results, device, output.name if output else label)


def compression_config(args: argparse.Namespace) -> Any:
    """The library's CompressionConfig for the flags."""
    from palu import QuantizationConfig
    from palu.config import chooses_bits
    from palu.core.errors import PaluError

    chosen = chooses_bits(args.search_method)
    if chosen and (args.lt_bits, args.lt_value_bits) != (None, None):
        raise PaluError(f"search_method {args.search_method} chooses the bits; give no lt_bits or lt_value_bits")
    return asked_compression(args, quantization=QuantizationConfig().changed_by_flags(vars(args), chosen))


def load_inputs(
    source: str, model_config: Any, config: Any, dtype: Any, output: Path | None, device: str, args: argparse.Namespace
) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and the calibration windows; refuses a disk too small for the result."""
    import torch

    from palu.checkpoint import check_space, load_model, load_tokenizer
    from palu.pipeline import calibration_windows, check_moments
    from utils.console import working

    with working("reading the calibration text and the model"):
        tokenizer = load_tokenizer(source, args.trust_remote_code)
        windows = calibration_windows(tokenizer, model_config, config)
        check_moments(config, windows)
        compute_dtype = torch.float32 if device == "cpu" else dtype
        model = load_model(source, compute_dtype, device, args.trust_remote_code)
    if output is not None:
        check_space(output, sum(p.numel() for p in model.parameters()) * dtype.itemsize)
    return model, tokenizer, windows


def checkpoint_name(model: str, config: Any) -> str:
    """`{MODEL}_ratio-{r}_gs-{gs}-{search}-{decompose}`, with a value group size, what else is done, and bits."""
    groups = f"gs-{config.head_group_size}"
    if config.value_group_size not in (None, config.head_group_size):
        groups += f"-vgs-{config.value_group_size}"
    latents = "-hadamard" if config.lt_hadamard else ""
    if not config.quantization.is_full:
        key_bits, value_bits = config.quantization.key_bits, config.quantization.value_bits
        latents += f"-{key_bits}bit" if key_bits == value_bits else f"-k{key_bits}v{value_bits}bit"
    if config.quantization.group_size is not None:
        latents += f"-lgs-{config.quantization.group_size}"
    methods = f"{config.search_method}-{config.decompose_method}"
    methods += "".join(f"-{name}" for name in ("regroup", "sequential") if getattr(config, name))
    methods += f"-adapt-{config.adapt:g}" if config.adapt else ""
    methods += f"-key_cost-{config.key_cost:g}" if config.key_cost != 1 else ""
    methods += f"-max_key_rank-{config.max_key_rank}" if config.max_key_rank else ""
    return f"{model}_ratio-{config.param_ratio_target:g}_{groups}-{methods}{latents}"


def report(
    args: argparse.Namespace,
    config: Any,
    compression: Any,
    tokenizer: Any,
    output: Path | None,
    path: Path,
    device: str,
    label: str,
) -> None:
    """Save the checkpoint and the record, print the tables."""
    import time

    from palu.checkpoint import save_checkpoint
    from utils.console import console, working
    from utils.report import plot_ranks, rank_table, stage_table
    from utils.results import compression_rows, environment, write_results

    asked = vars(args) | {"compression": config.to_dict(), "calibration": compression.calibration}
    results = {
        "rows": compression_rows(label, compression),
        "config": asked,
        "environment": environment(device, args.seed),
    }
    if output is not None:
        started = time.perf_counter()
        with working(f"writing {output}"):
            save_checkpoint(compression.model, tokenizer, output, results, args.max_shard_size, args.overwrite)
        results["rows"].append({"kind": "stage", "stage": "save", "seconds": time.perf_counter() - started})
    write_results(path, results)
    plot_ranks(results, path.with_suffix(".png"))
    rank_table(results)
    stage_table(results)
    shown = label if args.output_dir is None else args.output_dir
    written = f"checkpoint: {shown}" if output else "no checkpoint written (--no-dump_huggingface_model)"
    console.print(f"{written}\nrecord: {path}, plot: {path.with_suffix('.png')}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_script(parse, main)
