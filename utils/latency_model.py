"""A whole decoder step of models with random weights, over static caches that are full but for the step's own token."""

import functools
from typing import TYPE_CHECKING, Any

from palu.nn.latent_cache import LatentCache
from palu.nn.latent_layer import LatentLayer
from utils import latency
from utils.latency_shapes import PIECE, common_columns
from utils.random_models import latent_model, stock_model

if TYPE_CHECKING:
    import torch


class FullLatentCache(LatentCache):
    """A cache of fixed capacity whose next token fills it: everything in it is visible, so no mask is needed."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args, **kwargs) -> tuple[Any, Any]:
        """As in `LatentCache`."""
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.layers[layer_idx].filled = self.layers[layer_idx].capacity
        return found


def attend_without_mask(model: Any, backend: str) -> None:
    """Make a model attend to all of its cache, by a backend of `latency.full_attention`.

    With a static cache transformers builds a mask at every step, which flash attention cannot take; of an attention
    function that is not registered for masks it asks none.
    """
    from transformers import AttentionInterface

    # A number, because transformers looks for packages that the names of backends remind it of.
    name = f"unmasked_{('eager', *latency.SDPA_BACKENDS).index(backend)}"
    AttentionInterface.register(name, functools.partial(_attend, backend))
    model.set_attn_implementation(name)


def _attend(
    backend: str, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Any, None]:
    return latency.full_attention(backend, query, key, value, scaling).transpose(1, 2).contiguous(), None


def filled_cache(model: Any, batch: int, context: int) -> Any:
    """A cache of `context` random tokens with room for one more; no prefill runs through the model."""
    import torch
    from transformers import StaticCache

    from palu.models import is_latent

    latents = is_latent(model)
    cache = (
        FullLatentCache(model.config, capacity=context + 1)
        if latents
        else StaticCache(config=model.config, max_cache_len=context + 1)
    )
    start = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    model(start, past_key_values=cache, position_ids=start, use_cache=True)  # allocates
    for index, layer in enumerate(cache.layers):
        if latents:
            _fill_latents(layer, model.config.latent.layers[index])
        else:
            layer.keys.normal_()
            layer.values.normal_()
    set_length(cache, context)
    return cache


def _fill_latents(layer: Any, ranks: Any) -> None:
    """Random latents, stored as the layer stores them, a piece at a time; tokens stand at positions 0, 1, ..."""
    import torch

    for buffer, width in ((layer.key_buffer, sum(ranks.key)), (layer.value_buffer, sum(ranks.value))):
        rows, capacity, _ = buffer.parts[0].storage.shape
        step = max(1, PIECE // (rows * width))
        for start in range(0, capacity, step):
            shape = (rows, min(step, capacity - start), width)
            tokens = torch.randn(shape, device=layer.device, dtype=layer.dtype)
            for part, tensor in zip(buffer.parts, buffer.encode(tokens), strict=True):
                part.storage[:, start : start + tensor.shape[1]] = tensor
    if layer.holds_positions:
        positions = layer.position_buffer.storage
        positions.copy_(torch.arange(positions.shape[1], device=positions.device)[None, :, None])


def set_length(cache: Any, context: int) -> None:
    """Make a static cache hold its first `context` tokens; its tensors stay where they are."""
    for layer in cache.layers:
        if isinstance(layer, LatentLayer):
            layer.written.fill_(context)
            layer.cumulative_length = context
        else:
            layer.cumulative_length.fill_(context)


def random_token(model: Any, batch: int) -> "torch.Tensor":
    """A new token for every row."""
    import torch

    return torch.randint(model.config.vocab_size, (batch, 1), device=model.device)


def step_call(model: Any, cache: Any, token: "torch.Tensor", context: int) -> latency.Call:
    """The step of one new token per row behind `context` cached ones; returns its logits. model: compiled or not."""
    import torch

    position = torch.full_like(token, context)
    return lambda: model(token, past_key_values=cache, position_ids=position, use_cache=True).logits


def compiled(model: Any) -> Any:
    """The model through torch.compile, for one cache and one shape, as transformers does with a static cache."""
    import torch

    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)


class Models:
    """The model that is being measured; only one is in memory at a time."""

    def __init__(
        self, shape: str, context: int, kept: tuple[float, int, float], device: str, compiles: bool = False
    ) -> None:
        """kept: kept ratio, group size, values' share of it, as `latent_model` takes them."""
        import torch

        self.shape, self.context, self.device, self.compiles = shape, context, device, compiles
        self.kept = kept
        self.config = stock_model(shape, torch.float16, "meta", context + 1).config
        self.held: tuple[Any, Any] = (None, None)

    def get(self, provider: str, bits: int) -> Any:
        """The stock model, or latents of so many bits (random weights)."""
        import torch

        import palu

        if self.held[0] != (provider, bits):
            self.held = (None, None)
            latency.free_memory()
            if provider == "latents":
                model = latent_model(self.config, torch.float16, self.device, *self.kept)
                palu.set_quantization(model, palu.QuantizationConfig(bits, bits))
                attend_without_mask(model, "sdpa")
            else:
                model = stock_model(self.shape, torch.float16, self.device, self.context + 1)
            self.held = ((provider, bits), model)
        return self.held[1]


def measure_step(
    models: Models, provider: str, bits: int, batch: int, context: int, repeats: int, graph: bool
) -> dict[str, Any]:
    """The row of one model, batch and context.

    Args:
        provider: `latents`, or `stock` with the attention backend behind a space.
    """
    import torch

    kind, _, backend = provider.partition(" ")

    def timed() -> tuple[latency.Timing, int, int | None]:
        from palu import cache_nbytes

        model = models.get(kind, bits)
        if kind == "stock":
            attend_without_mask(model, backend)
        cache = filled_cache(model, batch, context)
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(model.device)
        call = step_call(compiled(model) if models.compiles else model, cache, random_token(model, batch), context)
        timing = latency.time_calls([call], repeats, graph, before=lambda: set_length(cache, context))
        return timing, cache_nbytes(cache), torch.cuda.max_memory_allocated(model.device) if on_gpu else None

    found, note = latency.attempt(timed, optional=kind == "stock")
    timing, cache_bytes, peak = found or (None, None, None)
    # The cache is gone by now, unless a failed call's frames held it.
    latency.free_memory()
    return {
        **common_columns(provider, bits, context, batch, baseline=kind == "stock"),
        **latency.timing_columns(timing, note),
        "model_shape": models.shape,
        "tokens_per_second": timing and batch / timing.median * 1e6,
        "peak_bytes": peak,
        "cache_bytes": cache_bytes,
    }
