"""Mistral as a compressed model. Its sliding window, where the config has one, is kept by mask and cache."""

from transformers import MistralConfig, MistralForCausalLM, MistralModel

from palu.models.base import LatentCausalLMMixin, LatentConfigMixin, LatentModelMixin, ModelAdapter


class PaluMistralConfig(LatentConfigMixin, MistralConfig):
    """MistralConfig with the `palu` block."""

    model_type = "palu_mistral"
    palu: dict | None = None


class PaluMistralModel(LatentModelMixin, MistralModel):
    """MistralModel over latents."""

    config_class = PaluMistralConfig


class PaluMistralForCausalLM(LatentCausalLMMixin, MistralForCausalLM):
    """MistralForCausalLM over latents."""

    config_class = PaluMistralConfig
    decoder_class = PaluMistralModel


ADAPTER = ModelAdapter(
    model_type="mistral",
    config_class=PaluMistralConfig,
    model_class=PaluMistralModel,
    causal_lm_class=PaluMistralForCausalLM,
)
