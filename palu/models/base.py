"""What the families share: the config block, latent layers in place of full ones, generation with the latent cache."""

from dataclasses import dataclass
from os import PathLike, makedirs
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast

from palu.config import LatentConfig, head_dim
from palu.core.errors import PaluError
from palu.models.remote_code import auto_map, write_remote_code
from palu.nn.latent_attention import LatentAttention
from palu.nn.latent_cache import LatentCache, adopt_cache, check_dropped, new_token_mask
from palu.nn.low_rank_linear import LowRankLinear
from palu.nn.rotary import KeyRotation, check_rope


@dataclass(frozen=True)
class ModelAdapter:
    """One family: the stock model type it comes from and the latent classes it becomes."""

    model_type: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]

    def latent_config(self, config: PreTrainedConfig, latent: LatentConfig) -> PreTrainedConfig:
        """The compressed model's config for a stock model's config."""
        entries = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
        latent_config = self.config_class(**entries, palu=latent.to_dict())
        classes = (self.config_class, self.model_class, self.causal_lm_class)
        latent_config.auto_map = auto_map(self.config_class.__module__, *(cls.__name__ for cls in classes))
        latent_config.architectures = [self.causal_lm_class.__name__]
        return latent_config


class LatentConfigMixin:
    """Adds the checked `palu` block to a family's config."""

    @property
    def latent(self) -> LatentConfig:
        """The parsed block.

        Raises:
            PaluError: if it is missing or does not fit the model.
        """
        latent = LatentConfig.from_dict(self.palu)
        latent.check_model(self.num_hidden_layers, self.num_key_value_heads, head_dim(self))
        return latent


def check_loading_info(path: str | PathLike, info: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not exactly the model's.

    Raises:
        PaluError: naming the tensors.
    """
    misshapen = [f"{name} {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    kinds = {"missing": info["missing_keys"], "misshapen": misshapen, "unexpected": info["unexpected_keys"]}
    problems = [
        f"{len(found)} {kind} tensors: {'; '.join(sorted(found)[:4])}{'; ...' if len(found) > 4 else ''}"
        for kind, found in kinds.items()
        if found
    ]
    if problems:
        raise PaluError(f"{path}: {', '.join(problems)}")


class LatentPreTrainedMixin:
    """Weights: initialisation, strict loading, saving together with the code that loads them."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, PreTrainedModel):
            # transformers finds attention weights by module class.
            cls._can_record_outputs = (cls._can_record_outputs or {}) | {"attentions": LatentAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        is_new = isinstance(module, LowRankLinear) and module.up is not None
        if is_new and not getattr(module.up, "_is_hf_initialized", False):
            nn.init.normal_(module.up, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, *args, **kwargs):
        """As in transformers, but a checkpoint with missing or misshapen tensors is refused.

        Raises:
            PaluError: naming the tensors.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        check_loading_info(pretrained_model_name_or_path, info)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs) -> None:
        """As in transformers, plus the modelling code, for programs that do not import palu."""
        # The code first: with push_to_hub the directory is uploaded inside the call to super.
        makedirs(save_directory, exist_ok=True)
        write_remote_code(type(self).__module__, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)


class LatentModelMixin(LatentPreTrainedMixin):
    """A family's decoder with LatentAttention in every layer and a LatentCache by default."""

    query_key_norm = False

    def __init__(self, config: PreTrainedConfig) -> None:
        check_rope(config.rope_parameters["rope_type"])
        super().__init__(config)
        for layer, ranks in zip(self.layers, config.latent.layers, strict=True):
            layer.self_attn = LatentAttention(layer.self_attn, ranks, self.query_key_norm)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As in transformers; a cache, given or made here, holds latents."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and (self.is_gradient_checkpointing or not self.config.latent.quantization.is_full):
            # Codes have no gradient.
            use_cache = False
        if past_key_values is not None:
            adopt_cache(past_key_values, self.config)
        elif use_cache:
            past_key_values = LatentCache(self.config)
        new = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            key_rotation=KeyRotation(self.rotary_emb),
            token_mask=new_token_mask(past_key_values, attention_mask, new),
            **kwargs,
        )
        if new > 1:
            check_dropped(past_key_values, new)
        return output


class LatentCausalLMMixin(LatentPreTrainedMixin):
    """A family's language model around its latent decoder; `generate` makes the latent cache."""

    decoder_class: type[PreTrainedModel]
    _largest_capacity = 0

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.post_init()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        wanted = generation_config.cache_implementation
        given = model_kwargs.get("past_key_values")
        if given is not None:
            adopt_cache(given, self.config)
        elif wanted not in (None, "dynamic", "static"):
            raise PaluError(f"cache_implementation {wanted!r} is not for compressed models; use dynamic or static")
        elif generation_config.use_cache is not False:
            capacity = self._fixed_capacity(generation_config, max_cache_length) if wanted == "static" else None
            model_kwargs["past_key_values"] = LatentCache(self.config, max_length=max_cache_length, capacity=capacity)
            sparse = self.config.latent.sparsity is not None
            if generation_mode == GenerationMode.ASSISTED_GENERATION and sparse:
                raise PaluError("assisted decoding needs a cache that drops no tokens; give no token_sparse_method")
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _fixed_capacity(self, generation_config: GenerationConfig, needed: int) -> int:
        """Tokens that a cache of fixed capacity gets: as in transformers, never fewer than one before it had.

        Steps that were compiled for that one serve it, too.
        """
        # Versions before `max_cache_len` do not have it.
        wanted = getattr(generation_config, "max_cache_len", None) or 0
        self._largest_capacity = max(needed, wanted, self._largest_capacity)
        return self._largest_capacity
