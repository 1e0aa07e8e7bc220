"""Result files: flat rows, what was asked, and where it ran."""

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from palu.core.errors import PaluError

PACKAGES = (
    *("palu-kv", "torch", "transformers", "triton", "safetensors", "numpy", "datasets", "lm-eval", "accelerate"),
    # LongBench's metrics; with the last of them fuzzywuzzy computes other ratios.
    *("jieba", "rouge", "fuzzywuzzy", "python-Levenshtein"),
)


def environment(device: str, seed: int) -> dict[str, Any]:
    """Commit, versions, device, seed and date of a run."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # The imported build, which may not be the one that a package manager knows of.
    versions["torch"] = torch.__version__
    name = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu ({torch.get_num_threads()} threads)"
    )
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit(), "versions": versions, "device": name, "seed": seed, "date": date}


def commit() -> str | None:
    """The checkout's commit, with `-dirty` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def results_path(asked: str | None, script: str, model: str) -> Path:
    """The result file that was asked for, or `results/<model>_<script>.json`; checked before any long work.

    Raises:
        PaluError: if it cannot be written.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(model).resolve().name).strip("-")
    path = Path("results") / f"{name}_{script}.json" if asked is None else Path(asked)
    if path.is_dir() or path.name == "":
        raise PaluError(f"--results {asked} is a directory; name a file")
    if path.suffix == ".png":
        raise PaluError(f"--results {asked}: the plot takes that name; use another ending, such as .json")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PaluError(f"--results {path}: {parent} is not a directory that can be written to")
    return path


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `{"rows", "config", "environment"}`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_results(path: Path) -> dict[str, Any]:
    """A result file's object."""
    return json.loads(path.read_text())


def compression_rows(model: str, compression: Any) -> list[dict[str, Any]]:
    """Flat rows of a `palu.Compression`: a summary, ranks by site, layers' fusion, stages' times, what adapting did."""
    from palu.config import chooses_bits
    from palu.nn.fusion import fusion_sizes

    itemsize, latent = compression.model.dtype.itemsize, compression.model.config.latent
    summary = {
        "kind": "summary",
        "model": model,
        "target": latent.compression["param_ratio_target"],
        "target_of": "bytes" if chooses_bits(latent.compression["search_method"]) else "numbers",
        "kept_ratio": compression.kept_ratio,
        "latent_bytes_per_token": latent.bytes_per_token(itemsize),
        "full_numbers": sum(shape.group_dim for shape in compression.shapes),
        "full_bytes_per_token": sum(shape.group_dim for shape in compression.shapes) * itemsize,
    }
    ranks = [
        {
            "kind": "rank",
            "model": model,
            "layer": shape.site.layer,
            "side": shape.site.side,
            "group": shape.site.group,
            "rank": compression.plan.ranks[shape.site],
            "group_dim": shape.group_dim,
            "bits": latent.quantization.bits(shape.site.side, shape.site.layer),
        }
        for shape in compression.shapes
    ]
    fusion = [
        {
            "kind": "fusion",
            "model": model,
            "layer": index,
            "fused": layer.fused_values,
            "weights_apart": sizes.apart,
            "weights_folded": sizes.folded,
            "latents_fit_a_head": sizes.fits,
        }
        for index, (layer, sizes) in enumerate(zip(latent.layers, fusion_sizes(compression.model.config), strict=True))
    ]
    done = compression.adaptation
    adapted = [] if done is None else [{"kind": "adaptation", "model": model} | dataclasses.asdict(done)]
    return [summary, *ranks, *fusion, *adapted, *({"kind": "stage"} | stage for stage in compression.stages)]
