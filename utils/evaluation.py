"""What the scripts that evaluate models share: which models, and what is wrong with them before any long work."""

from pathlib import Path
from typing import Any


def labels(models: list[str]) -> list[str]:
    """Directory names; whole paths where two are equal; a model beside itself is marked as the baseline."""
    names = [Path(model).resolve().name if Path(model).exists() else model for model in models]
    if len(set(names)) < len(names):
        names = list(models)
    if len(set(names)) < len(names):
        names[1] += " (baseline)"
    return names


def open_models(models: list[str], trust_remote_code: bool) -> tuple[list[Any], list[Any]]:
    """Configs and tokenizers of models whose weights are there.

    Raises:
        PaluError: naming the model and what is missing.
    """
    from palu.checkpoint import check_weight_files, load_config, load_tokenizer

    configs, tokenizers = [], []
    for model in models:
        configs.append(load_config(model, trust_remote_code))
        tokenizers.append(load_tokenizer(model, trust_remote_code))
        check_weight_files(model)
    return configs, tokenizers


def check_counts(counts: dict[str, Any]) -> None:
    """Refuse flags that must be at least 1 where they are given.

    Raises:
        PaluError: naming the flag.
    """
    from palu.core.errors import PaluError

    for flag, value in counts.items():
        if value is not None and value < 1:
            raise PaluError(f"{flag} {value} must be at least 1")


def free_memory() -> None:
    """Give back the memory of a model that nobody holds any more, before the next one is loaded."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_writable(flag: str, directory: str) -> None:
    """Refuse a directory that cannot be made or written to.

    Raises:
        PaluError: naming the flag.
    """
    import os

    from palu.core.errors import PaluError

    path = Path(directory).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PaluError(f"{flag} {directory}: {there} is not a directory that can be written to")
