"""What the scripts that evaluate models share: which models, and what is wrong with them before any long work."""

from pathlib import Path
from typing import Any

from utils.sparsity import sparsity_row


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


def described(model: Any, label: str) -> dict[str, Any]:
    """Entries of a row that say which model it is and how its cache keeps what it keeps."""
    from palu.models import is_latent

    cached = {"kept_ratio": kept_ratio(model.config), **latent_bits(model)}
    settings = model.config.latent.quantization if is_latent(model) else None
    if settings is not None and not settings.is_full:
        named = ("group_size", "symmetric", "clip_ratio", "sinks", "window")
        cached |= {f"lt_{name}": getattr(settings, name) for name in named}
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model": label, **cached, **sparsity_row(model.config), "dtype": dtype}


def latent_bits(model: Any) -> dict[str, Any]:
    """Mean bits of a cached number, keys and values apart, and whether latents are Hadamard-turned."""
    from palu.models import is_latent

    full = model.dtype.itemsize * 8
    if not is_latent(model):
        return {"bits": full, "value_bits": full, "hadamard": False}
    latent = model.config.latent
    key, value = (_mean_bits(latent, side, full) for side in ("key", "value"))
    return {"bits": key, "value_bits": value, "hadamard": latent.hadamard}


def _mean_bits(latent: Any, side: str, full: int) -> float:
    """Of one side's latents; a whole number where all layers are alike."""
    bits = [latent.quantization.bits(side, layer) for layer in range(len(latent.layers))]
    bits = [full if each == 16 else each for each in bits]
    if len(set(bits)) == 1:
        return bits[0]
    ranks = [sum(getattr(layer, side)) for layer in latent.layers]
    return round(sum(each * rank for each, rank in zip(bits, ranks, strict=True)) / sum(ranks), 2)


def kept_ratio(config: Any) -> float:
    """Cached numbers per token over the uncompressed model's: 1 for a stock model."""
    from palu.config import head_dim
    from palu.models import is_latent

    if not is_latent(config):
        return 1.0
    full = 2 * config.num_key_value_heads * head_dim(config) * config.num_hidden_layers
    return sum(sum(layer.key) + sum(layer.value) for layer in config.latent.layers) / full
