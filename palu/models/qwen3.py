"""Qwen3 as a compressed model. Its per-head key norm is applied to rebuilt keys, before RoPE."""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from palu.models.base import LatentCausalLMMixin, LatentConfigMixin, LatentModelMixin, ModelAdapter


class PaluQwen3Config(LatentConfigMixin, Qwen3Config):
    """Qwen3Config with the `palu` block."""

    model_type = "palu_qwen3"
    palu: dict | None = None


class PaluQwen3Model(LatentModelMixin, Qwen3Model):
    """Qwen3Model over latents."""

    config_class = PaluQwen3Config
    query_key_norm = True


class PaluQwen3ForCausalLM(LatentCausalLMMixin, Qwen3ForCausalLM):
    """Qwen3ForCausalLM over latents."""

    config_class = PaluQwen3Config
    decoder_class = PaluQwen3Model


ADAPTER = ModelAdapter(
    model_type="qwen3",
    config_class=PaluQwen3Config,
    model_class=PaluQwen3Model,
    causal_lm_class=PaluQwen3ForCausalLM,
)
