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


def described(model: Any, label: str) -> dict[str, Any]:
    """Entries of a row that say which model it is and how its cache keeps what it keeps."""
    from utils.perplexity import kept_ratio, latent_bits
    from utils.sparsity import sparsity_row

    cached = {"kept_ratio": kept_ratio(model.config), **latent_bits(model), **sparsity_row(model.config)}
    return {"model": label, **cached, "dtype": str(model.dtype).removeprefix("torch.")}
