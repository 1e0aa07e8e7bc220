"""Tables and heat maps of retrieval, drawn from result files only."""

from pathlib import Path
from typing import Any

from utils.console import print_table
from utils.report import cache_label, headless_pyplot, save_figure


def retrieval_table(results: dict[str, Any]) -> None:
    """A line per way of caching and length, a column per probe, means over depths; the cache's bytes beside them."""
    from palu.evaluate.retrieval import DISTRACTORS

    rows = results["rows"]
    probes = list(dict.fromkeys(row["probe"] for row in rows))
    lines = []
    for variant, length in dict.fromkeys((row["variant"], row["length"]) for row in rows):
        mine = [row for row in rows if (row["variant"], row["length"]) == (variant, length)]
        found = [_mean([row["accuracy"] for row in mine if row["probe"] == probe]) for probe in probes]
        held = _mean([row["kv_bytes_per_token"] for row in mine])
        named = [mine[0]["model"], cache_label(mine[0])]
        lines.append([*named, f"{length:,}", *(f"{each:.3f}" for each in found), f"{held:,.0f}"])
    title = f"Retrieval, won trials, {rows[0]['trials']} at each of {len({row['depth'] for row in rows})} depths"
    columns = ["model", "cache", "tokens", *probes, "KV B/tok"]
    print_table(title, columns, lines, f"by chance: {1 / (DISTRACTORS + 1):.3f}")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def plot_retrieval(results: dict[str, Any], path: Path) -> None:
    """Length across, depth downwards; a row of maps per probe, a column per way of caching."""
    plt = headless_pyplot()
    rows = results["rows"]
    probes, variants, lengths, depths = (
        list(dict.fromkeys(row[what] for row in rows)) for what in ("probe", "variant", "length", "depth")
    )
    size = (max(5.0, 2.9 * len(variants)), 2.6 * len(probes))
    figure, axes = plt.subplots(len(probes), len(variants), figsize=size, layout="constrained", squeeze=False)
    image = None
    for probe, line in zip(probes, axes, strict=True):
        for variant, axis in zip(variants, line, strict=True):
            mine = {
                (row["depth"], row["length"]): row for row in rows if (row["probe"], row["variant"]) == (probe, variant)
            }
            grid = [[mine[depth, length]["accuracy"] for length in lengths] for depth in depths]
            image = axis.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
            for y, values in enumerate(grid):
                for x, value in enumerate(values):
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
            first = next(iter(mine.values()))
            axis.set_title(f"{first['model']}\n{cache_label(first)}", fontsize=6)
            axis.set_xticks(range(len(lengths)), lengths, fontsize=7)
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        line[0].set_ylabel(f"{probe}\ndepth", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("tokens", fontsize=8)
    figure.colorbar(image, ax=axes, label="won trials")
    save_figure(figure, path)
