"""Offline changes of a compressed model's weights that leave what it computes as it is."""

import dataclasses

from transformers import PreTrainedModel

from palu.config import LatentConfig, QuantizationConfig
from palu.core.hadamard import orthonormal_hadamard
from palu.nn.low_rank_linear import LowRankLinear


def set_quantization(model: PreTrainedModel, quantization: QuantizationConfig) -> None:
    """Change how the caches that `model` makes from now on store latents; saved with the model's config."""
    latent = LatentConfig.from_dict(model.config.palu)
    model.config.palu = dataclasses.replace(latent, quantization=quantization).to_dict()


def fold_hadamard(model: PreTrainedModel) -> None:
    """Turn every group's latents by an orthonormal Hadamard matrix: `down <- H down`, `up <- up H^T`, in place.

    Exact but for rounding, free at run time, and it spreads outliers over a group's latents, which quantisation profits
    from (Palu, section 3.4). The config notes it; a model that has it already is left alone.

    Raises:
        PaluError: if a rank has no Hadamard matrix, naming the nearest one; nothing is changed then.
    """
    latent = LatentConfig.from_dict(model.config.palu)
    if latent.hadamard:
        return
    projections = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    turns = {rank: orthonormal_hadamard(rank) for rank in sorted({r for p in projections for r in p.ranks})}
    for projection in projections:
        projection.turn_latents([turns[rank] for rank in projection.ranks])
    model.config.palu = dataclasses.replace(latent, hadamard=True).to_dict()
