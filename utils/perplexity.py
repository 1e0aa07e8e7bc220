"""Rows of perplexity measurements."""

import dataclasses
from typing import Any

from utils.sparsity import sparsity_row


def row_of(result: Any, model: Any, label: str, dataset: str, bits: int | None, key_axis: str) -> dict[str, Any]:
    """The flat row of one measurement; bits: of plain quantisation, None where the model's own cache was used."""
    cached = {} if bits is None else {"bits": bits, "value_bits": bits, "hadamard": False}
    measured = {"dataset": dataset, **dataclasses.asdict(result), "plain": None if bits is None else key_axis}
    return described(model, label) | measured | cached


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
