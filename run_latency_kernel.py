"""Time of the scores kernel, rotated queries against key latents, beside what it replaces and this GPU's floors.

    python run_latency_kernel.py
    python run_latency_kernel.py --total_rank 1024 --group_size 4 --target_seq_lens 4096,65536 --bits 16,4 --check
    python run_latency_kernel.py --num_heads 32 --num_kv_heads 8 --total_rank 256 --rope_base 500000

Three ways to the same scores of one query token are timed on random inputs: `kernel` (this toolkit's), `rebuild` (plain
PyTorch: keys rebuilt from latents, rotated, multiplied with the queries; packed latents are dequantised first) and
`full keys` (one product of queries with an uncompressed fp16 key cache: what a stock model does).

The floors follow from what the device reaches in a large copy and a large matrix product, measured first:
  bytes = latents (or codes, scales and zero points) read once + fp32 scores written
  FLOPs = 2 * batch * length * (sum of ranks * group_size * head_dim + heads * head_dim)
That is the work of exact rebuilding. The kernel interpolates slow RoPE pairs and can do with fewer FLOPs, so its time
may fall below the floor of exact rebuilding.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from utils import latency
from utils.cli import add_common_flags, bit_list, group_size, new_parser, run_script
from utils.latency import Call, Cost, Peaks
from utils.latency_shapes import (
    Heads,
    add_rest_flag,
    check_bits,
    check_counts,
    check_rest,
    check_rope_base,
    common_columns,
    count_list,
    full_score_cost,
    in_float64,
    random_latents,
    random_up,
    record_path,
    relative_error,
    rotation_of,
    score_cost,
)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("--total_rank", type=int, default=1024, help="sum of the key ranks over all groups (default: %(default)s)")
    flag("--group_size", type=group_size, default=4, help="kv heads per group, or all (default: %(default)s)")
    flag("--num_heads", type=int, default=32, help="query heads (default: %(default)s)")
    flag("--num_kv_heads", type=int, help="key heads (default: as many as query heads)")
    flag("--head_dim", type=int, default=128, help="numbers per head: 64, 96 or 128 (default: %(default)s)")
    flag(
        "--target_seq_lens",
        type=count_list,
        default=[4096, 16384, 65536, 262144],
        help="cached tokens, comma-separated (default: 4096,16384,65536,262144)",
    )
    flag("--bits", type=bit_list, default=[16], help="bits of the latents: 16,8,4,3,2, comma-separated (default: 16)")
    flag("--batch_size", type=int, default=1, help="rows (default: %(default)s)")
    flag("--rope_base", type=float, default=10000.0, help="base of the rotary frequencies (default: %(default)s)")
    flag("--check", action="store_true", help="also compare the kernel's scores with float64")
    flag("--repeats", type=int, default=20, help="measurements per time (default: %(default)s)")
    add_rest_flag(flag)
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure every length, write the record, print the table."""
    import torch

    from utils.console import console, progress, working
    from utils.latency_report import kernel_table, plot_latency, write_csv
    from utils.results import environment, write_results

    heads, ranks = check_flags(args)
    path = record_path(args.results, "latency-kernel", f"rank-{args.total_rank}_heads-{args.num_heads}")
    device = latency.select_gpu(args.device)
    torch.manual_seed(args.seed)
    with working("measuring this device's peaks"):
        peaks = latency.measure_peaks(device, args.rest)
    ways = [("full keys", 16), *((way, bits) for bits in args.bits for way in ("rebuild", "kernel"))]
    tasks = [(*way, length) for length in args.target_seq_lens for way in ways]
    rows = []
    with torch.no_grad():
        for provider, bits, length in progress(tasks, "timing", len(tasks)):
            rows.append(measure(provider, heads, ranks, bits, length, args, device, peaks))
    latency.add_ratios(rows)
    config = vars(args) | {"ranks": ranks, "peaks": peaks._asdict()}
    results = {"rows": rows, "config": config, "environment": environment(device, args.seed)}
    write_results(path, results)
    plot_latency(results, path.with_suffix(".png"))
    write_csv(results, path.with_suffix(".csv"))
    kernel_table(results)
    files = ", ".join(str(path.with_suffix(suffix)) for suffix in (".png", ".csv"))
    console.print(f"record: {path}, {files}", highlight=False, soft_wrap=True)


def check_flags(args: argparse.Namespace) -> tuple[Heads, tuple[int, ...]]:
    """Refuse what cannot be measured; returns the heads and the ranks of their groups."""
    heads = Heads.asked(args)
    ranks = heads.ranks(args.total_rank, "--total_rank")
    check_bits(args.bits)
    counts = {"--target_seq_lens": args.target_seq_lens, "--batch_size": args.batch_size, "--repeats": args.repeats}
    check_counts(counts)
    check_rest(args.rest)
    check_rope_base(args.rope_base)
    return heads, ranks


def measure(
    provider: str,
    heads: Heads,
    ranks: tuple[int, ...],
    bits: int,
    length: int,
    args: argparse.Namespace,
    device: str,
    peaks: Peaks,
) -> dict[str, Any]:
    """The row of one way at one length."""
    batch = args.batch_size
    full = provider == "full keys"
    cost = full_score_cost(heads, batch, length) if full else score_cost(heads, ranks, bits, batch, length)

    def timed() -> tuple[latency.Timing, float | None]:
        check = None
        if full:
            calls = latency.rotating_calls(lambda: full_keys_call(heads, batch, length, device), cost.bytes, device)
        else:
            scores = Scores(heads, ranks, bits, batch, length, args.rope_base, device)
            make = scores.kernel_call if provider == "kernel" else scores.rebuild_call
            calls = latency.rotating_calls(make, cost.bytes, device)
            check = scores.error if provider == "kernel" and args.check else None
        return latency.time_calls(calls, args.repeats, rest=args.rest), check and check()

    found, note = latency.attempt(timed)
    return row_of(provider, heads, bits, length, batch, cost, peaks, found or (None, None), note)


def row_of(
    provider: str,
    heads: Heads,
    bits: int,
    length: int,
    batch: int,
    cost: Cost,
    peaks: Peaks,
    found: Sequence[Any],
    note: str | None,
) -> dict[str, Any]:
    """The flat row of one measurement."""
    timing, error = found
    return {
        **common_columns(provider, bits, length, batch, baseline=provider != "kernel"),
        **latency.timing_columns(timing, note),
        **latency.cost_columns(timing, cost, peaks),
        "relative_error": error,
        **heads.columns(),
        "group_size": heads.group_size,
    }


def full_keys_call(heads: Heads, batch: int, length: int, device: str) -> Call:
    """The product of new random queries with new random full keys."""
    import torch

    options = {"device": device, "dtype": torch.float16}
    queries = heads.num_heads // heads.num_kv_heads
    query = torch.randn(batch, heads.num_kv_heads, queries, heads.head_dim, **options) * heads.head_dim**-0.5
    keys = torch.randn(batch, heads.num_kv_heads, length, heads.head_dim, **options)
    return lambda: torch.matmul(query, keys.mT)


class Scores:
    """What calls of one configuration share, as the layers of a model do in a step: the rotation and its tables."""

    def __init__(
        self, heads: Heads, ranks: tuple[int, ...], bits: int, batch: int, length: int, base: float, device: str
    ) -> None:
        self.heads, self.ranks, self.bits, self.batch, self.length, self.device = (
            heads, ranks, bits, batch, length, device,
        )  # fmt: skip
        self.rotation = rotation_of(heads, base, batch, length, device)

    def inputs(self) -> tuple[Any, Any, Any]:
        """New random queries (rotated and scaled), latents and their up side."""
        import torch

        from palu.kernels.latents import LatentProjection

        shape = (self.batch, self.heads.num_heads, 1, self.heads.head_dim)
        query = torch.randn(shape, device=self.device, dtype=torch.float16) * self.heads.head_dim**-0.5
        latents = random_latents(self.batch, self.length, self.ranks, self.bits, self.device)
        return query, latents, LatentProjection(random_up(self.heads, self.ranks, self.device), self.ranks)

    def kernel_call(self) -> Call:
        """The kernel on new inputs; its scores stay in the layout that attention reads them in."""
        query, latents, key = self.inputs()
        if not query.is_cuda:
            from palu.kernels.latent_scores.op import latent_scores

            return lambda: latent_scores(query, latents, key, self.rotation)
        from palu.kernels.latent_scores.launch import launch_scores

        rows = query[:, :, 0].contiguous()
        return lambda: launch_scores(rows, latents, key, self.rotation, mask=None, rows_per_latent=1, scaling=1.0)

    def rebuild_call(self) -> Call:
        """The plain PyTorch definition on new inputs."""
        import torch

        from palu.kernels.latent_scores.reference import latent_scores
        from palu.kernels.latents import dense

        query, latents, key = self.inputs()
        self.rotation.tables(torch.float16)
        return lambda: latent_scores(query, dense(latents, torch.float16), key, self.rotation)

    def error(self) -> float:
        """Relative error of the kernel's scores of new inputs to float64."""
        from palu.kernels.latent_scores.op import latent_scores
        from palu.kernels.latent_scores.reference import latent_scores as reference

        query, latents, key = self.inputs()
        queries = query.double().chunk(self.heads.groups, dim=1)

        def of_group(group: int) -> Any:
            return reference(queries[group], *in_float64(latents, key, group, self.heads.groups), self.rotation)

        return relative_error(latent_scores(query, latents, key, self.rotation), of_group, self.heads.groups, dim=1)


if __name__ == "__main__":
    run_script(parse, main)
