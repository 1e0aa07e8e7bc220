"""Qwen2 as a compressed model. Qwen2 and Qwen2.5: biases on query, key and value stay outside the latents."""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from palu.models.base import LatentCausalLMMixin, LatentConfigMixin, LatentModelMixin, ModelAdapter


class PaluQwen2Config(LatentConfigMixin, Qwen2Config):
    """Qwen2Config with the `palu` block."""

    model_type = "palu_qwen2"
    palu: dict | None = None


class PaluQwen2Model(LatentModelMixin, Qwen2Model):
    """Qwen2Model over latents."""

    config_class = PaluQwen2Config


class PaluQwen2ForCausalLM(LatentCausalLMMixin, Qwen2ForCausalLM):
    """Qwen2ForCausalLM over latents."""

    config_class = PaluQwen2Config
    decoder_class = PaluQwen2Model


ADAPTER = ModelAdapter(
    model_type="qwen2",
    config_class=PaluQwen2Config,
    model_class=PaluQwen2Model,
    causal_lm_class=PaluQwen2ForCausalLM,
)
