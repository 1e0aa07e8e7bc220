"""Tables, CSV files and plots of latencies, drawn from result files only."""

import csv
from pathlib import Path
from typing import Any

from utils.console import print_table
from utils.report import headless_pyplot, save_figure

ERROR_LIMIT = 2e-3


def kernel_table(results: dict[str, Any]) -> None:
    """Times of the scores, what they achieve, and the floors of exact rebuilding."""
    lines = [
        [
            *_place(row)[:2],
            *_times(row),
            _digits(row["terabytes_per_second"], 2),
            _digits(row["teraflops_per_second"], 0),
            _digits(row["memory_floor_microseconds"]),
            _digits(row["compute_floor_microseconds"]),
            _percent(row["fraction_of_floor"]),
            _digits(row["ratio_to_fastest_baseline"], 2),
        ]
        for row in latency_rows(results)
    ]
    remarks = [
        _peaks(results),
        "mem, mtx: floor of exact rebuilding from the one and the other, us; floor%: the larger one over the time",
        "ratio: the time of the fastest of full keys and rebuild over this one",
        *_remarks(results),
    ]
    columns = ["tokens", "provider", "us", "p20-p80", "TB/s", "TF/s", "mem", "mtx", "floor%", "ratio"]
    rows = results["config"]["batch_size"]
    print_table(f"Scores of {_shape(results)}, batch {rows}", columns, lines, caption="\n".join(remarks))


def attention_table(results: dict[str, Any]) -> None:
    """Times of a decoding step's attention against the fastest baseline of the same length and batch."""
    lines = [
        [
            *_place(row),
            *_times(row),
            _digits(row["bytes"] / 1e9, 2),
            f"{row['flops'] / 1e9:.0f}",
            _digits(row["floor_microseconds"]),
            _percent(row["fraction_of_floor"]),
            _digits(row["ratio_to_fastest_baseline"], 2),
        ]
        for row in latency_rows(results)
    ]
    remarks = [
        _peaks(results),
        "floor: the larger of what bytes and FLOPs take, us, with all keys rebuilt (interpolated ones need fewer)",
        "floor%: it over the time; ratio: the fastest baseline's time over this one",
        *_remarks(results),
    ]
    columns = ["tokens", "provider", "rows", "us", "p20-p80", "GB", "GFLOP", "floor", "floor%", "ratio"]
    print_table(f"Attention of {_shape(results)}", columns, lines, caption="\n".join(remarks))


def model_table(results: dict[str, Any]) -> None:
    """Times of a whole decoding step, tokens per second, memory."""
    lines = [
        [
            *_place(row),
            *_times(row, 1000, 2),
            _digits(row["tokens_per_second"], 1),
            _digits(row["peak_bytes"] and row["peak_bytes"] / 1e9, 2),
            _digits(row["cache_bytes"] and row["cache_bytes"] / 1e9, 2),
            _digits(row["ratio_to_fastest_baseline"], 2),
        ]
        for row in latency_rows(results)
    ]
    remarks = [
        "peak, cache: GB of the step and of the cache alone; ratio: the fastest stock model's time over this one",
        *_remarks(results),
    ]
    columns = ["tokens", "provider", "rows", "ms", "p20-p80", "tok/s", "peak", "cache", "ratio"]
    title = f"Decoding step of {results['config']['model_shape']}, {results['environment']['device']}"
    print_table(title, columns, lines, caption="\n".join(remarks))


def profile_table(results: dict[str, Any], most: int = 20) -> None:
    """GPU time of the kernels of an eager step, the longest first."""
    rows = [row for row in results["rows"] if row["kind"] == "profile"]
    total = sum(row["microseconds_per_step"] for row in rows)
    lines = [
        [
            row["kernel"][:50],
            f"{row['calls_per_step']:g}",
            _digits(row["microseconds_per_step"]),
            _percent(row["microseconds_per_step"] / total if total else None),
        ]
        for row in rows[:most]
    ]
    title = f"Kernels of a step of {results['config']['profiled']}, {len(rows)} in all"
    print_table(title, ["kernel", "calls", "us", "share"], lines)


def latency_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements, without the profile."""
    return [row for row in results["rows"] if row["kind"] == "latency"]


def write_csv(results: dict[str, Any], path: Path) -> None:
    """The measurements as a table that spreadsheets read."""
    rows = latency_rows(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def plot_latency(results: dict[str, Any], path: Path) -> None:
    """Time against cached tokens, one line a provider and bits, one panel a batch size; both axes logarithmic."""
    plt = headless_pyplot()
    rows = latency_rows(results)
    batches = list(dict.fromkeys(row["batch_size"] for row in rows))
    figure, axes = plt.subplots(1, len(batches), figsize=(5.5 * len(batches), 4), layout="constrained", squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        mine = [row for row in rows if row["batch_size"] == batch and row["microseconds"] is not None]
        for name in dict.fromkeys(_name(row) for row in mine):
            line = sorted(
                (row["prompt_len"], row["microseconds"], row["baseline"]) for row in mine if _name(row) == name
            )
            lengths, times, baseline = zip(*line, strict=True)
            style = "--" if baseline[0] else "-"
            axis.plot(lengths, times, style, marker="o", markersize=4, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(title=f"{batch} row{'' if batch == 1 else 's'}", xlabel="cached tokens", ylabel="microseconds")
        axis.grid(alpha=0.3, which="both")
        if mine:
            axis.legend(fontsize=7)
    figure.suptitle(results["environment"]["device"], fontsize=10)
    save_figure(figure, path)


def _shape(results: dict[str, Any]) -> str:
    row = latency_rows(results)[0]
    heads = f"{row['num_heads']}/{row['num_kv_heads']} heads of {row['head_dim']}, group size {row['group_size']}"
    if row.get("value_group_size") not in (None, row["group_size"]):
        heads += f", of values {row['value_group_size']}"
    return f"one token, {heads}, {results['environment']['device']}"


def _peaks(results: dict[str, Any]) -> str:
    peaks = results["config"]["peaks"]
    copy, matmul = peaks["bytes_per_second"] / 1e12, peaks["flops_per_second"] / 1e12
    return f"this device: copy {copy:.2f} TB/s, fp16 matrix product {matmul:,.0f} TFLOP/s"


def _name(row: dict[str, Any]) -> str:
    """The provider, with the bits of latents, those of values behind them where they are others."""
    if row["provider"] not in ("latents", "kernel", "rebuild"):
        return row["provider"].replace("stock sdpa_", "stock ")
    value_bits = row.get("value_bits")
    bits = f"{row['bits']}" if value_bits in (None, row["bits"]) else f"{row['bits']}/{value_bits}"
    return f"{row['provider']} {bits}"


def _length(row: dict[str, Any]) -> str:
    length = row["prompt_len"]
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _place(row: dict[str, Any]) -> tuple[str, str, int]:
    return _length(row), _name(row), row["batch_size"]


def _remarks(results: dict[str, Any]) -> list[str]:
    """Errors to float64, and what could not be measured."""
    errors: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    for row in latency_rows(results):
        where = f"{row['batch_size']} x {_length(row)}"
        error = row.get("relative_error")
        if error is not None:
            beyond = "" if error < ERROR_LIMIT else f", BEYOND {ERROR_LIMIT:g}"
            errors.setdefault(_name(row), []).append(f"{error:.1e} ({where}{beyond})")
        if row["note"] is not None:
            notes.setdefault(f"{_name(row)}: {row['note']}", []).append(where)
    remarks = [f"relative error to float64, {name}: {', '.join(parts)}" for name, parts in errors.items()]
    slowest = max(latency_rows(results), key=lambda row: row["first_call_seconds"] or 0.0)
    if slowest["first_call_seconds"] is not None:
        where = f"{_name(slowest)}, {slowest['batch_size']} x {_length(slowest)}"
        remarks.append(
            f"longest first call, with what Triton had to compile: {slowest['first_call_seconds']:.1f} s ({where})"
        )
    return remarks + [f"{note} ({', '.join(places)})" for note, places in notes.items()]


def _times(row: dict[str, Any], unit: float = 1.0, decimals: int | None = None) -> list[str | None]:
    """The median, and the range from the 20th to the 80th percentile."""
    if row["microseconds"] is None:
        return [None, None]
    median, low, high = (_digits(row[name] / unit, decimals) for name in ("microseconds", "p20", "p80"))
    return [median, f"{low}-{high}"]


def _digits(value: float | None, decimals: int | None = None) -> str | None:
    """Four digits, or so many decimals."""
    if value is None:
        return None
    if decimals is None:
        decimals = 0 if value >= 1000 else 1 if value >= 100 else 2
    return f"{value:.{decimals}f}"


def _percent(fraction: float | None) -> str | None:
    return None if fraction is None else f"{fraction:.0%}"
