"""Time of a decoding step: attention over latents, or a whole model with them, beside what users would run instead.

    python run_latency_attention.py --palu
    python run_latency_attention.py --palu --rank_k 1024 --rank_v 3072 --prompt_len 4096,65536 --bits 16,8,4 --check
    python run_latency_attention.py --palu --num_heads 32 --num_kv_heads 8 --rank_k 256 --rank_v 768
    python run_latency_attention.py --palu --scope model --model_shape llama-3-8b --prompt_len 65536 --batch_size 1,4

Without --palu only the baselines are timed: torch's SDPA with its flash and its cuDNN backend and a plain matrix
product, softmax, matrix product, each over a full fp16 key and value cache of fixed size. Calls are held in a CUDA
graph and rotate over random inputs that together are several times larger than the L2 cache. Between measurements the
GPU rests (--rest): a model's step is not attention alone, of which 0.1 s on end may reach a GPU's power limit.

The floor is the larger of bytes / copy bandwidth and FLOPs / matrix throughput, both measured first on this device:
  bytes = latents (or codes, scales and zero points) read once; baselines: full keys and values
  FLOPs = 2 * batch * length * (sum of key ranks * group_size * head_dim + heads * head_dim + sum of value ranks * query
          heads per group): keys rebuilt exactly; baselines: 4 * batch * length * heads * head_dim

--scope model times the step of a model of a well-known shape, with random weights and a cache full of random data.
"""

import argparse
from pathlib import Path
from typing import Any

from utils import latency
from utils.cli import add_common_flags, bit_list, group_size, new_parser, run_script
from utils.latency import Call
from utils.latency_shapes import (
    REST,
    Heads,
    add_rest_flag,
    check_bits,
    check_counts,
    check_rest,
    check_rope_base,
    count_list,
    record_path,
)
from utils.random_models import MODEL_SHAPES, check_shares

SHAPES = [shape for shape in MODEL_SHAPES if shape != "tiny"]
BASELINES = {"attention": ("sdpa_flash", "sdpa_cudnn", "eager"), "model": ("sdpa", "sdpa_flash", "sdpa_cudnn")}
# Flags of one scope only, with their defaults; an absent one is None until then.
DEFAULTS = {
    "attention": {
        "rank_k": 1024, "rank_v": 3072, "value_group_size": None, "num_heads": 32, "num_kv_heads": None,
        "head_dim": 128, "rope_base": 10000.0, "no_rope": False, "key_biases": False, "key_norm": False,
        "value_bits": None, "sinks": 0, "window": 0, "check": False, "rest": REST,
    },
    "model": {"model_shape": "llama-2-7b", "kept_ratio": 0.5, "value_share": 0.75, "compile": False},
}  # fmt: skip
PROFILED_STEPS = 3


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("--scope", choices=("attention", "model"), default="attention", help="what is timed (default: %(default)s)")
    flag("--palu", action="store_true", help="time the latents too, not the baselines only")
    flag("--prompt_len", type=count_list, default=[65536], help="cached tokens, comma-separated (default: 65536)")
    flag("--batch_size", type=count_list, default=[1], help="rows, comma-separated (default: 1)")
    flag("--bits", type=bit_list, default=[16], help="bits of the latents: 16,8,4,3,2, comma-separated (default: 16)")
    flag("--group_size", type=group_size, default=4, help="kv heads per group, or all (default: %(default)s)")
    flag("--baseline", choices=("sdpa_flash", "sdpa_cudnn", "eager", "all"), default="all", help="(default: all)")
    flag(
        "--cuda_graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="replay CUDA graphs, so that launching costs nothing (default: yes)",
    )
    flag("--repeats", type=int, default=20, help="measurements per time (default: %(default)s)")
    flag("--torch_profile", action="store_true", help="trace a few eager steps and list their kernels")
    part = parser.add_argument_group("--scope attention").add_argument
    part("--rank_k", type=int, help="sum of the key ranks over all groups (default: 1024)")
    part("--rank_v", type=int, help="sum of the value ranks (default: 3072)")
    part("--value_group_size", type=group_size, help="kv heads per group of values (default: as --group_size)")
    part("--value_bits", type=int, help="bits of the value latents (default: as --bits)")
    part("--sinks", type=int, help="first tokens that are exact beside codes (default: 0)")
    part("--window", type=int, help="newest tokens that are exact beside codes (default: 0)")
    part("--num_heads", type=int, help="query heads (default: 32)")
    part("--num_kv_heads", type=int, help="key and value heads (default: as many as query heads)")
    part("--head_dim", type=int, help="numbers per head: 64, 96 or 128 (default: 128)")
    part("--rope_base", type=float, help="base of the rotary frequencies (default: 10000)")
    part("--no_rope", action="store_true", default=None, help="no rotation: keys' up factors are in the queries")
    part("--key_biases", action="store_true", default=None, help="keys have biases, as in Qwen2")
    part("--key_norm", action="store_true", default=None, help="keys are normalised, as in Qwen3")
    part("--check", action="store_true", default=None, help="also compare the latents' output with float64")
    add_rest_flag(part, default=None)
    part = parser.add_argument_group("--scope model").add_argument
    part("--model_shape", choices=SHAPES, help="(default: llama-2-7b)")
    part("--kept_ratio", type=float, help="kept fraction of the cache (default: 0.5)")
    part("--value_share", type=float, help="values' part of what is kept (default: 0.75)")
    part("--compile", action="store_true", default=None, help="compile the stock model and the latents' first")
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure every configuration, write the record, print the table."""
    import torch

    from utils.console import console
    from utils.latency_report import attention_table, model_table, plot_latency, profile_table, write_csv
    from utils.results import environment, write_results

    heads = check_flags(args)
    name = args.model_shape if heads is None else f"heads-{heads.num_heads}-{heads.num_kv_heads}"
    path = record_path(args.results, "latency-attention", name)
    device = latency.select_gpu(args.device)
    torch.manual_seed(args.seed)
    measure = measure_models if heads is None else measure_attention
    trace = path.with_suffix(".trace.json.gz") if args.torch_profile else None
    with torch.no_grad():
        rows, found = measure(args, heads, device, trace)
    results = {"rows": rows, "config": vars(args) | found, "environment": environment(device, args.seed)}
    write_results(path, results)
    plot_latency(results, path.with_suffix(".png"))
    write_csv(results, path.with_suffix(".csv"))
    if args.torch_profile:
        profile_table(results)
    (model_table if heads is None else attention_table)(results)
    files = [str(path.with_suffix(suffix)) for suffix in (".png", ".csv")] + ([str(trace)] if trace else [])
    console.print(f"record: {path}, {', '.join(files)}", highlight=False, soft_wrap=True)


def check_flags(args: argparse.Namespace) -> Heads | None:
    """Refuse what cannot be measured, fill in defaults; returns the heads, or None where a model has them."""
    from palu.core.validate import require

    other = "model" if args.scope == "attention" else "attention"
    for name in DEFAULTS[other]:
        given = getattr(args, name) is not None
        require(not given, f"--{name} is for --scope {other}; the scope here is {args.scope}")
    for name, default in DEFAULTS[args.scope].items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    check_bits(args.bits)
    lists = {"--prompt_len": args.prompt_len, "--batch_size": args.batch_size}
    check_counts(lists | {"--repeats": args.repeats})
    if args.scope == "model":
        check_shares(args)
        return None
    heads = Heads.asked(args)
    heads.ranks(args.rank_k, "--rank_k")
    heads.values.ranks(args.rank_v, "--rank_v")
    check_rest(args.rest)
    check_rope_base(args.rope_base)
    require(args.palu or not args.check, "--check compares the latents with float64; it needs --palu")
    for name in ("no_rope", "key_biases", "key_norm", "value_group_size", "value_bits", "sinks", "window"):
        given = getattr(args, name) != DEFAULTS["attention"][name]
        require(args.palu or not given, f"--{name} changes the latents only; it needs --palu")
    check_codes(args)
    for name in ("key_biases", "key_norm"):
        needless = args.no_rope and getattr(args, name)
        require(not needless, f"--{name} is for keys that are rotated, which --no_rope says no to")
    return heads


def check_codes(args: argparse.Namespace) -> None:
    """Refuse values' bits that there are not, and exact tokens where all are."""
    from palu.core.validate import require

    if args.value_bits is not None:
        check_bits([args.value_bits], "--value_bits")
    shortest = min(args.prompt_len)
    for name in ("sinks", "window"):
        count = getattr(args, name)
        require(count >= 0, f"--{name} {count} must be at least 0")
        for flag, bits in (("--bits", max(args.bits)), ("--value_bits", args.value_bits or 0)):
            require(bits < 16 or not count, f"--{name} is for tokens beside codes; with it {flag} must be below 16")
    exact = args.sinks + args.window
    require(exact < shortest, f"--sinks and --window, {exact} tokens, must be fewer than --prompt_len {shortest}")


def baselines(args: argparse.Namespace) -> tuple[str, ...]:
    """The baselines that are asked for."""
    return BASELINES[args.scope] if args.baseline == "all" else (args.baseline,)


def measure_attention(
    args: argparse.Namespace, heads: Heads, device: str, trace: Path | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of every configuration of the attention alone; what else was found out."""
    from utils.console import progress, working
    from utils.latency_attention import Attention, measure

    with working("measuring this device's peaks"):
        peaks = latency.measure_peaks(device, args.rest)
    variants = [(name, 16) for name in baselines(args)] + [("latents", bits) for bits in args.bits if args.palu]
    tasks = [
        Attention(heads, provider, bits, batch, length, args, device)
        for length in args.prompt_len
        for batch in args.batch_size
        for provider, bits in variants
    ]
    rows = [measure(task, peaks) for task in progress(tasks, "timing", len(tasks))]
    latency.add_ratios(rows)
    found: dict[str, Any] = {"peaks": peaks._asdict()}
    if trace is not None:
        task = tasks[len(baselines(args)) if args.palu else 0]
        found["profiled"] = f"{task.provider}, {task.bits} bits, {task.batch} x {task.length}"
        rows += profiled(task.call, trace)
    return rows, found


def measure_models(
    args: argparse.Namespace, heads: None, device: str, trace: Path | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of every model, context and batch; what else was found out."""
    from utils.console import progress
    from utils.latency_model import Models, filled_cache, measure_step, random_token, set_length, step_call

    kept = (args.kept_ratio, args.group_size, args.value_share)
    models = Models(args.model_shape, max(args.prompt_len), kept, device, args.compile)
    stock = [[(f"stock {name}", 16) for name in baselines(args)]]
    variants = stock + [[("latents", bits)] for bits in args.bits if args.palu]
    places = [(batch, length) for length in args.prompt_len for batch in args.batch_size]
    tasks = [(*task, *place) for group in variants for place in places for task in group]
    rows = [
        measure_step(models, *task, args.repeats, args.cuda_graph) for task in progress(tasks, "timing", len(tasks))
    ]
    latency.add_ratios(rows)
    order = {place: index for index, place in enumerate(places)}
    rows.sort(key=lambda row: order[row["batch_size"], row["prompt_len"]])
    if trace is None:
        return rows, {}
    provider, bits, batch, length = next((task for task in tasks if task[0] == "latents"), tasks[0])

    def step() -> Call:
        model = models.get(provider.split()[0], bits)
        cache = filled_cache(model, batch, length)
        call = step_call(model, cache, random_token(model, batch), length)
        return lambda: (set_length(cache, length), call())

    return rows + profiled(step, trace), {"profiled": f"{provider}, {bits} bits, {batch} x {length}"}


def profiled(make: Any, trace: Path) -> list[dict[str, Any]]:
    """Rows of the kernels of a few eager calls."""
    from utils.console import working

    with working("tracing a few steps"):
        return latency.profile([make()] * PROFILED_STEPS, trace)


if __name__ == "__main__":
    run_script(parse, main)
