"""Result files: flat rows, what was asked, and where it ran."""

import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("palu-kv", "torch", "transformers", "triton", "safetensors", "numpy", "datasets", "lm-eval", "accelerate")


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
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def default_path(script: str, model: str) -> Path:
    """`results/<model>_<script>.json`."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name or model).strip("-")
    return Path("results") / f"{name}_{script}.json"


def write_results(path: Path, rows: list[dict[str, Any]], config: dict[str, Any], env: dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps({"rows": rows, "config": config, "environment": env}, indent=1) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_results(path: Path) -> dict[str, Any]:
    """A result file's object."""
    return json.loads(path.read_text())


def compression_rows(model: str, compression: Any) -> list[dict[str, Any]]:
    """Flat rows of a `palu.Compression`: a summary, every site's rank, every stage's time."""
    itemsize = compression.model.dtype.itemsize
    summary = {
        "kind": "summary",
        "model": model,
        "target": compression.model.config.palu["compression"]["param_ratio_target"],
        "kept_ratio": compression.kept_ratio,
        "latent_bytes_per_token": sum(compression.plan.ranks.values()) * itemsize,
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
        }
        for shape in compression.shapes
    ]
    return [summary, *ranks, *({"kind": "stage"} | stage for stage in compression.stages)]
