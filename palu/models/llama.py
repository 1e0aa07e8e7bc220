"""Llama as a compressed model. Llama 2, 3 and 3.1 differ in their config only (GQA, RoPE scaling)."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from palu.models.base import LatentCausalLMMixin, LatentConfigMixin, LatentModelMixin, ModelAdapter


class PaluLlamaConfig(LatentConfigMixin, LlamaConfig):
    """LlamaConfig with the `palu` block."""

    model_type = "palu_llama"
    palu: dict | None = None


class PaluLlamaModel(LatentModelMixin, LlamaModel):
    """LlamaModel over latents."""

    config_class = PaluLlamaConfig


class PaluLlamaForCausalLM(LatentCausalLMMixin, LlamaForCausalLM):
    """LlamaForCausalLM over latents."""

    config_class = PaluLlamaConfig
    decoder_class = PaluLlamaModel


ADAPTER = ModelAdapter(
    model_type="llama",
    config_class=PaluLlamaConfig,
    model_class=PaluLlamaModel,
    causal_lm_class=PaluLlamaForCausalLM,
)
