"""A model of some class around the tensors of another."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def rebuilt(
    model: PreTrainedModel, model_class: type[PreTrainedModel], config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A model with these weights, which are not copied, and with what else `model` has: RoPE's frequencies, which are
    no part of a state dict, the generation config, and the mode.
    """
    with torch.device("meta"):
        other = model_class(config)
    other.load_state_dict(state, strict=True, assign=True)
    other.tie_weights()
    # Copies, so that casting or changing one model leaves the other alone.
    other.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    other.generation_config = copy.deepcopy(model.generation_config)
    return other.train(model.training)
