"""Tables and plots, drawn from result files only."""

from pathlib import Path
from types import ModuleType
from typing import Any

from utils.console import print_table
from utils.sparsity import sparsity_label


def rank_table(results: dict[str, Any]) -> None:
    """The rank plan, one line a layer, and where the time went."""
    ranks = [row for row in results["rows"] if row["kind"] == "rank"]
    lines, coded = [], any(row["bits"] != 16 for row in ranks)
    for layer in sorted({row["layer"] for row in ranks}):
        cells: list[Any] = [layer]
        for side in ("key", "value"):
            mine = [row for row in ranks if row["layer"] == layer and row["side"] == side]
            kept = sum(row["rank"] for row in mine) / sum(row["group_dim"] for row in mine)
            cells += [" ".join(str(row["rank"]) for row in mine), f"{kept:.0%}"]
            cells += [mine[0]["bits"]] if coded else []
        lines.append(cells)
    summary = next(row for row in results["rows"] if row["kind"] == "summary")
    caption = [_kept_line(summary), _fusion_line([row for row in results["rows"] if row["kind"] == "fusion"])]
    caption += [_adaptation_line(row) for row in results["rows"] if row["kind"] == "adaptation"]
    caption += _wide_lines(ranks)
    print_table(
        f"Ranks per group: {summary['model']}",
        ["layer", *(name for side in ("key", "value") for name in (f"{side} ranks", "kept", *(["bits"] * coded)))],
        lines,
        caption="\n".join(caption),
    )


def _wide_lines(ranks: list[dict[str, Any]]) -> list[str]:
    """That layers keep more of their keys than decode fast, a list of one line or none."""
    from palu.kernels.decode_attention.spec import FAST_KEY_RANK

    wide = {row["layer"] for row in ranks if row["side"] == "key" and row["rank"] > FAST_KEY_RANK}
    if not wide:
        return []
    layers = "one layer keeps" if len(wide) == 1 else f"{len(wide)} layers keep"
    return [
        f"{layers} more than {FAST_KEY_RANK} latents of a group's keys, with which decoding may be slower than over a "
        f"full cache; --max_key_rank {FAST_KEY_RANK} bounds them"
    ]


def _kept_line(summary: dict[str, Any]) -> str:
    """What is kept beside what was asked for, which is of numbers or of a 16-bit cache's bytes."""
    found, full = summary["latent_bytes_per_token"], summary["full_bytes_per_token"]
    kept = f"kept ratio {summary['kept_ratio']:.4f}"
    if summary["target_of"] == "bytes":
        budget = summary["target"] * 2 * summary["full_numbers"]
        return f"{kept} of the numbers; {found:,} of {full:,} bytes per token, target {budget:,.0f}"
    return f"{kept} of target {summary['target']}; {found:,} of {full:,} bytes per token"


def _fusion_line(rows: list[dict[str, Any]]) -> str:
    """In how many layers the values' up factors went into o_proj, and why not in the others."""
    fused = [row for row in rows if row["fused"]]
    line = f"values' up factors folded into o_proj in {len(fused)} of {len(rows)} layers"
    if fused:
        saved = sum(row["weights_apart"] - row["weights_folded"] for row in fused)
        line += f", {saved:,} weights fewer to read per step"
    apart = [row for row in rows if not row["fused"]]
    if apart:
        ratio = sum(row["weights_folded"] for row in apart) / sum(row["weights_apart"] for row in apart)
        where = "elsewhere" if fused else "everywhere"
        line += f"; apart {where}: folding would make these weights {ratio:.2f} times as large"
        line += "" if all(row["latents_fit_a_head"] for row in apart) else ", latents wider than a head"
    return line


def _adaptation_line(row: dict[str, Any]) -> str:
    """What tuning on the calibration text gained, and how much further predictions drifted."""
    if row["step"] == 0:
        return "output projections were not tuned: no step lowers the calibration text's loss within that share"
    gained = row["loss"] - row["adapted_loss"]
    return (
        f"output projections tuned on the calibration text: {gained:.4f} nats per token less loss on held-out windows "
        f"of it, divergence from the original {row['divergence']:.5f} to {row['adapted_divergence']:.5f}"
    )


def stage_table(results: dict[str, Any]) -> None:
    """Seconds and peak memory of every stage."""
    stages = [row for row in results["rows"] if row["kind"] == "stage"]
    lines = [[row["stage"], f"{row['seconds']:.1f}", _gigabytes(row.get("peak_gpu_bytes"))] for row in stages]
    lines.append(["total", f"{sum(row['seconds'] for row in stages):.1f}", None])
    print_table("Time", ["stage", "seconds", "peak GPU GB"], lines)


def perplexity_table(results: dict[str, Any]) -> None:
    """Perplexity and cached bytes of everything that was measured, one table a text, against the last model named."""
    for dataset in dict.fromkeys(row["dataset"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["dataset"] == dataset]
        reference = rows[-1]["model"] if len(rows) > 1 else None
        base = next((row for row in rows if row["model"] == reference and not row["plain"]), None)
        measured = [row["divergence"] for row in rows if row.get("divergence") is not None]
        lines = [
            [
                _variant(row),
                _bits(row),
                f"{row['perplexity']:.3f}",
                f"{row['perplexity'] / base['perplexity'] - 1:+.2%}" if base and row is not base else None,
                *([f"{row['divergence']:.5f}"] if measured else []),
                f"{row['kv_bytes_per_token']:,.0f}",
                f"{row['kv_bytes_per_token'] / base['kv_bytes_per_token']:.3f}" if base else None,
            ]
            for row in rows
        ]
        first = rows[0]
        print_table(
            f"Perplexity on {Path(dataset).name}: {first['windows']} windows of {first['seqlen']:,}, "
            f"{first['tokens']:,} tokens predicted",
            ["model", "bits", "ppl", "diff", *(["KL"] if measured else []), "KV B/tok", "ratio"],
            lines,
        )


def _variant(row: dict[str, Any]) -> str:
    policy = sparsity_label(row)
    return row["model"] + (f" (plain, keys per {row['plain']})" if row["plain"] else "") + (policy and f", {policy}")


def _bits(row: dict[str, Any]) -> str:
    bits = f"{row['bits']}" if row["bits"] == row["value_bits"] else f"{row['bits']}/{row['value_bits']}"
    settings = {
        "H": row["hadamard"],
        f"group {row.get('lt_group_size')}": row.get("lt_group_size"),
        "sym": row.get("lt_symmetric"),
        f"clip {row.get('lt_clip_ratio')}": row.get("lt_clip_ratio", 1.0) != 1.0,
        f"{row.get('lt_sinks')}+{row.get('lt_window')} exact": row.get("lt_sinks") or row.get("lt_window"),
    }
    return " ".join([bits, *(name for name, shown in settings.items() if shown)])


def cache_label(row: dict[str, Any]) -> str:
    """How a row's model keeps its cache, in a few words."""
    policy = sparsity_label(row)
    return f"{_bits(row)} bits" + (policy and f", {policy}")


def plot_ranks(results: dict[str, Any], path: Path) -> None:
    """Kept fraction of every group: layers across, one row a group, keys above values."""
    plt = headless_pyplot()
    ranks = [row for row in results["rows"] if row["kind"] == "rank"]
    summary = next(row for row in results["rows"] if row["kind"] == "summary")
    layers = sorted({row["layer"] for row in ranks})
    figure, axes = plt.subplots(
        2, 1, figsize=(max(6.0, 0.32 * len(layers) + 2), 4.5), sharex=True, layout="constrained"
    )
    image = None
    for axis, side in zip(axes, ("key", "value"), strict=True):
        mine = {(row["group"], row["layer"]): row["rank"] / row["group_dim"] for row in ranks if row["side"] == side}
        groups = sorted({group for group, _ in mine})
        grid = [[mine[group, layer] for layer in layers] for group in groups]
        image = axis.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set_ylabel(f"{side} group")
        axis.set_yticks(range(len(groups)))
    axes[1].set_xlabel("layer")
    figure.suptitle(f"{summary['model']}: kept {summary['kept_ratio']:.3f} of the KV cache", fontsize=10)
    figure.colorbar(image, ax=axes, label="rank / group dimension")
    save_figure(figure, path)


def plot_perplexity(results: dict[str, Any], path: Path) -> None:
    """Perplexity against bytes per token, one panel a data set."""
    plt = headless_pyplot()
    datasets = list(dict.fromkeys(row["dataset"] for row in results["rows"]))
    figure, axes = plt.subplots(
        1, len(datasets), figsize=(4.5 * len(datasets), 3.6), layout="constrained", squeeze=False
    )
    for axis, dataset in zip(axes[0], datasets, strict=True):
        for row in (row for row in results["rows"] if row["dataset"] == dataset):
            label, marker = f"{_variant(row)}, {_bits(row)} bits", "x" if row["plain"] else "o"
            axis.scatter(row["kv_bytes_per_token"], row["perplexity"], s=60, label=label, marker=marker)
        axis.set(title=Path(dataset).name, xlabel="KV bytes per token", ylabel=f"perplexity (seqlen {row['seqlen']})")
        axis.set_xlim(left=0)
        axis.margins(y=0.3)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path)


def plot_front(results: dict[str, Any], path: Path) -> None:
    """What every way of caching loses against its bytes per token: perplexity above, divergence below."""
    plt = headless_pyplot()
    datasets = list(dict.fromkeys(row["dataset"] for row in results["rows"]))
    figure, axes = plt.subplots(2, len(datasets), figsize=(5 * len(datasets), 7), layout="constrained", squeeze=False)
    for column, dataset in enumerate(datasets):
        rows = [row for row in results["rows"] if row["dataset"] == dataset]
        full = next(row for row in rows if row["method"] is None and not row["plain"])
        above, below = axes[:, column]
        for name, front in _fronts([row for row in rows if row is not full]).items():
            shares = [_bytes_of_16_bits(row) / _bytes_of_16_bits(full) for row in front]
            style = "x--" if front[0]["plain"] else "o-"
            increase = [100 * (row["perplexity"] / full["perplexity"] - 1) for row in front]
            above.plot(shares, increase, style, label=name, markersize=5)
            below.plot(shares, [row["divergence"] for row in front], style, label=name, markersize=5)
        above.axhline(0, color="black", linewidth=0.8)
        # Straight below one percent, by powers of ten above.
        above.set_yscale("symlog", linthresh=1)
        below.set_yscale("log")
        above.set(title=Path(dataset).name, ylabel="perplexity, increase in %")
        below.set(xlabel="KV bytes, of the original's in 16 bits", ylabel="divergence of predictions, nats per token")
        for axis in (above, below):
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
    # The same ways everywhere.
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, path)


def _bytes_of_16_bits(row: dict[str, Any]) -> float:
    """A row's bytes with its numbers in 16 bits: a cache of 32 bits would make codes look smaller than they are.

    Of rows that hold numbers only or codes only.
    """
    return row["kv_bytes_per_token"] * min(1.0, 16 / min(row["bits"], row["value_bits"]))


def _fronts(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of every method and given number of bits, or of plain quantisation, by rising bytes."""
    from palu.config import chooses_bits

    fronts: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["kv_bytes_per_token"]):
        # Where a plan chose bits, those of every ratio are others.
        given = min(row["bits"], row["value_bits"]) < 16 and not chooses_bits((row["method"] or "").split("+")[0])
        if row["plain"]:
            name = f"plain quantisation, keys per {row['plain']}"
        else:
            name = f"{row['method']}, {_bits(row)} bits" if given else row["method"]
        fronts.setdefault(name, []).append(row)
    return fronts


def headless_pyplot() -> ModuleType:
    """matplotlib's pyplot, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure and let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    headless_pyplot().close(figure)


def _gigabytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e9:.2f}"
