"""GPU memory and time of generating with a long context: the stock model, latents, codes, fewer tokens.

Models of a given shape with random weights (no download) read random prompts in chunks and generate a few tokens. The
difference of two peaks is compared with what the caches' and the weights' sizes say it has to be. Times are those of
`generate` as it is, without CUDA graphs, after a shorter run: of a prompt and its first token, and per token after
that, at lengths that the process has decoded at before, and at new ones.

    python examples/measure_generation.py --model_shape llama-2-7b --context 32768 --batch_size 4 --bits 16,4
    python examples/measure_generation.py --context 16384 --batch_size 1 --prefill_chunk 16384 \\
        --policies snapkv,pool --prompt_capacity 2048
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import add_common_flags, bit_list, new_parser, resolve_device, run_script
from utils.random_models import MODEL_SHAPES, check_shares, latent_model, stock_model

# Flags that are counts.
COUNTS = ("context", "batch_size", "new_tokens", "prefill_chunk")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("--model_shape", choices=MODEL_SHAPES, default="llama-2-7b")
    flag("--context", type=int, default=32768, help="prompt tokens (default: %(default)s)")
    flag("--batch_size", type=int, default=4, help="rows (default: %(default)s)")
    flag("--new_tokens", type=int, default=16, help="generated tokens after the first (default: %(default)s)")
    flag("--prefill_chunk", type=int, default=2048, help="prompt tokens per forward pass (default: %(default)s)")
    flag("--kept_ratio", type=float, default=0.5, help="kept fraction of the cache (default: %(default)s)")
    flag("--value_share", type=float, default=0.75, help="values' part of what is kept (default: %(default)s)")
    flag("--group_size", type=int, default=4, help="kv heads per group (default: %(default)s)")
    flag("--bits", type=bit_list, default=[16, 4], help="bits of the latents, comma-separated (default: 16,4)")
    flag("--policies", default="", help="token policies to measure with each, comma-separated (default: none)")
    flag("--prompt_capacity", type=int, help="tokens that a layer keeps with a policy")
    flag(
        "--cache_implementation",
        choices=("dynamic", "static"),
        default="dynamic",
        help="dynamic: the cache grows; static: it has a fixed capacity, and transformers compiles the steps "
        "(default: %(default)s)",
    )
    add_common_flags(parser)
    return parser.parse_args(argv)


def asked_policies(args: argparse.Namespace) -> list[Any]:
    """No policy, then those that are asked for.

    Raises:
        PaluError: for an unknown one, or one that would drop nothing.
    """
    from palu.core.errors import PaluError
    from palu.token_sparsity import TokenSparsity

    names = [name.strip() for name in args.policies.split(",") if name.strip()]
    if bool(names) != (args.prompt_capacity is not None):
        raise PaluError("--policies and --prompt_capacity need each other")
    if names and args.cache_implementation == "static":
        raise PaluError("--policies are for a cache that grows; use --cache_implementation dynamic")
    if names and args.prompt_capacity >= args.context:
        raise PaluError(f"--prompt_capacity {args.prompt_capacity} must be below --context {args.context}")
    return [None, *(TokenSparsity(name, capacity=args.prompt_capacity) for name in names)]


def main(args: argparse.Namespace) -> None:
    """Measure every variant in turn, print the table."""
    import torch

    import palu
    from palu.core.errors import PaluError
    from utils.evaluation import check_counts
    from utils.results import environment, results_path, write_results

    check_counts({f"--{name}": getattr(args, name) for name in COUNTS})
    if args.context <= args.new_tokens + 1:
        raise PaluError(f"--context {args.context} must be above --new_tokens {args.new_tokens} + 1")
    settings = [palu.QuantizationConfig(bits, bits) for bits in args.bits]
    policies = asked_policies(args)
    check_shares(args)
    device = resolve_device(args.device)
    if not device.startswith("cuda"):
        raise PaluError("peak memory is measured on a CUDA GPU; there is none here")
    path = results_path(args.results, "generation", args.model_shape)
    torch.manual_seed(args.seed)
    dtype, context = torch.float16, args.context + args.new_tokens + 1
    model = stock_model(args.model_shape, dtype, device, context)
    config = model.config
    rows = [measure(model, "stock", args)]
    del model
    for setting in settings:
        gc.collect()
        torch.cuda.empty_cache()
        model = latent_model(config, dtype, device, args.kept_ratio, args.group_size, args.value_share)
        for policy in policies:
            palu.set_cache(model, setting, policy)
            label = f"latents, {setting.key_bits} bits" if policy is None else f"+ {policy.method}"
            rows.append(measure(model, label, args))
        del model
    add_differences(rows)
    results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
    write_results(path, results)
    report(results)


def measure(model: Any, label: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time and peak memory of one model's generation, with its parts."""
    import torch

    from utils.console import working

    ids = torch.randint(model.config.vocab_size, (args.batch_size, args.context), device=model.device)
    weights = torch.cuda.memory_allocated(model.device)
    count = args.new_tokens + 1
    with working(f"generating: {label}"):
        # Compiles kernels and asks the allocator for memory, at lengths before those that are measured.
        generated(model, warm_up_prompt(ids, args), count, args)
        generated(model, ids, 1, args)
        prompt_seconds, _ = generated(model, ids, 1, args)
        new_seconds, _ = generated(model, ids, count, args)
        torch.cuda.reset_peak_memory_stats(model.device)
        seconds, cache = generated(model, ids, count, args)
    peak = torch.cuda.max_memory_allocated(model.device)
    return {
        "model": label,
        "context": args.context,
        "batch_size": args.batch_size,
        "prompt_milliseconds": prompt_seconds * 1e3,
        "step_milliseconds": (seconds - prompt_seconds) / args.new_tokens * 1e3,
        "new_length_step_milliseconds": (new_seconds - prompt_seconds) / args.new_tokens * 1e3,
        "peak_bytes": peak,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "transient_bytes": peak - weights - cache,
        "cache_bytes_per_token": cache / (args.batch_size * (args.context + args.new_tokens)),
    }


def warm_up_prompt(ids: Any, args: argparse.Namespace) -> Any:
    """A prompt whose generation meets none of the measured lengths; all of it where the cache has one length."""
    return ids if args.cache_implementation == "static" else ids[:, : -args.new_tokens - 1]


def generated(model: Any, ids: Any, count: int, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds that greedy generation of `count` tokens took, and the bytes that its cache held at the end."""
    import torch

    from palu import cache_nbytes

    torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        # Of a prompt that is read in chunks, transformers compiles the forward passes as well.
        prefill_chunk_size=None if args.prefill_chunk >= args.context else args.prefill_chunk,
        cache_implementation=args.cache_implementation,
        return_dict_in_generate=True,
    )
    torch.cuda.synchronize(model.device)
    return time.perf_counter() - start, cache_nbytes(output.past_key_values)


def add_differences(rows: list[dict[str, Any]]) -> None:
    """How far each peak lies below the first one, beside what caches and weights say."""
    first = rows[0]
    for row in rows[1:]:
        row["saved_bytes"] = first["peak_bytes"] - row["peak_bytes"]
        row["expected_saved_bytes"] = sum(first[part] - row[part] for part in ("weight_bytes", "cache_bytes"))


def report(results: dict[str, Any]) -> None:
    """One table."""
    from utils.console import print_table

    def gigabytes(count: int | None) -> str | None:
        return None if count is None else f"{count / 1e9:.2f}"

    lines = []
    for row in results["rows"]:
        saved, expected = row.get("saved_bytes"), row.get("expected_saved_bytes")
        parts = (row[name] for name in ("peak_bytes", "weight_bytes", "cache_bytes", "transient_bytes"))
        off = f"{saved / expected - 1:+.1%}" if saved is not None else None
        times = (f"{row[f'{name}_milliseconds']:,.0f}" for name in ("prompt", "step", "new_length_step"))
        lines.append([row["model"], *map(gigabytes, (*parts, saved, expected)), off, *times])
    columns = ["GB", "peak", "weights", "cache", "rest", "saved", "expected", "off by", "prompt", "step", "new"]
    asked = results["config"]
    device = results["environment"]["device"]
    title = f"{asked['model_shape']}, {asked['batch_size']} rows of {asked['context']:,} tokens, {device}"
    note = (
        "milliseconds of a prompt with its first token and of a step after it, at lengths that the process has decoded "
        "at before and at new ones, for which some attention implementations prepare"
    )
    print_table(title, columns, lines, note)


if __name__ == "__main__":
    run_script(parse, main)
