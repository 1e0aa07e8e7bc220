"""Model families: one file each, and one line here."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from palu.core.errors import PaluError
from palu.models import llama, mistral, qwen2, qwen3
from palu.models.base import ModelAdapter

ADAPTERS: dict[str, ModelAdapter] = {
    module.ADAPTER.model_type: module.ADAPTER for module in (llama, mistral, qwen2, qwen3)
}


def get_adapter(config: PreTrainedConfig) -> ModelAdapter:
    """The adapter of a stock model's family.

    Raises:
        PaluError: listing the supported families, or saying that the model is compressed already.
    """
    if is_latent(config):
        raise PaluError(f"this {config.model_type} model is compressed already; compress the original")
    if config.model_type not in ADAPTERS:
        raise PaluError(f"model family {config.model_type!r} is not supported; supported: {', '.join(ADAPTERS)}")
    return ADAPTERS[config.model_type]


def is_latent(model: PreTrainedModel | PreTrainedConfig) -> bool:
    """Whether a model, or the model of a config, is compressed."""
    config = model.config if isinstance(model, PreTrainedModel) else model
    return config.model_type in {adapter.config_class.model_type for adapter in ADAPTERS.values()}


def register_auto_classes() -> None:
    """Teach transformers' Auto classes the latent families."""
    for adapter in ADAPTERS.values():
        AutoConfig.register(adapter.config_class.model_type, adapter.config_class, exist_ok=True)
        AutoModel.register(adapter.config_class, adapter.model_class, exist_ok=True)
        AutoModelForCausalLM.register(adapter.config_class, adapter.causal_lm_class, exist_ok=True)
