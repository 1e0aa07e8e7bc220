"""Peak GPU memory of generating with a long context: the stock model, latents, latents as codes.

Models of a given shape with random weights (no download) read random prompts in chunks and generate a few tokens; the
difference of two peaks is compared with what the caches' and the weights' sizes say it has to be.

    python examples/measure_memory.py --model_shape llama-2-7b --context 32768 --batch_size 4 --bits 16,4
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import add_common_flags, bit_list, new_parser, resolve_device, run_script
from utils.random_models import MODEL_SHAPES, latent_model, stock_model


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("--model_shape", choices=MODEL_SHAPES, default="llama-2-7b")
    flag("--context", type=int, default=32768, help="prompt tokens (default: %(default)s)")
    flag("--batch_size", type=int, default=4, help="rows (default: %(default)s)")
    flag("--new_tokens", type=int, default=8, help="generated tokens (default: %(default)s)")
    flag("--prefill_chunk", type=int, default=2048, help="prompt tokens per forward pass (default: %(default)s)")
    flag("--kept_ratio", type=float, default=0.5, help="kept fraction of the cache (default: %(default)s)")
    flag("--group_size", type=int, default=4, help="kv heads per group (default: %(default)s)")
    flag("--bits", type=bit_list, default=[16, 4], help="bits of the latents, comma-separated (default: 16,4)")
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure every variant in turn, print the table."""
    import torch

    import palu
    from palu.core.errors import PaluError
    from utils.results import environment, results_path, write_results

    device = resolve_device(args.device)
    if not device.startswith("cuda"):
        raise PaluError("peak memory is measured on a CUDA GPU; there is none here")
    path = results_path(args.results, "memory", args.model_shape)
    settings = [palu.QuantizationConfig(bits, bits) for bits in args.bits]
    torch.manual_seed(args.seed)
    dtype, context = torch.float16, args.context + args.new_tokens
    model = stock_model(args.model_shape, dtype, device, context)
    config = model.config
    rows = [measure(model, "stock", args)]
    del model
    for setting in settings:
        gc.collect()
        torch.cuda.empty_cache()
        model = latent_model(config, dtype, device, args.kept_ratio, args.group_size)
        palu.set_quantization(model, setting)
        rows.append(measure(model, f"latents, {setting.key_bits} bits", args))
        del model
    add_differences(rows)
    results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
    write_results(path, results)
    report(results)


def measure(model: Any, label: str, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one model's generation, with its parts."""
    import torch

    from palu import cache_nbytes

    ids = torch.randint(model.config.vocab_size, (args.batch_size, args.context), device=model.device)
    weights = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.new_tokens,
        min_new_tokens=args.new_tokens,
        do_sample=False,
        prefill_chunk_size=args.prefill_chunk,
        return_dict_in_generate=True,
    )
    peak = torch.cuda.max_memory_allocated(model.device)
    cache = cache_nbytes(output.past_key_values)
    return {
        "model": label,
        "context": args.context,
        "batch_size": args.batch_size,
        "peak_bytes": peak,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "transient_bytes": peak - weights - cache,
        "cache_bytes_per_token": cache / (args.batch_size * (args.context + args.new_tokens - 1)),
    }


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
        lines.append([row["model"], *map(gigabytes, (*parts, saved, expected)), off])
    columns = ["GB", "peak", "weights", "cache", "rest", "saved", "expected", "off by"]
    asked = results["config"]
    device = results["environment"]["device"]
    title = f"{asked['model_shape']}, {asked['batch_size']} rows of {asked['context']:,} tokens, {device}"
    print_table(title, columns, lines)


if __name__ == "__main__":
    run_script(parse, main)
