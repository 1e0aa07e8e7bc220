"""The cache of a compressed model: a transformers Cache whose layers hold latents."""

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, StaticCache

from palu.config import LatentConfig
from palu.core.errors import PaluError
from palu.nn.fixed_layer import FixedLatentLayer
from palu.nn.latent_layer import LatentLayer, LayerQuantization


def layer_window(config: PreTrainedConfig, layer: int) -> int | None:
    """The sliding window of one layer, None where it attends to everything."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return window
    return window if layer_types[layer] == "sliding_attention" else None


def layer_quantization(latent: LatentConfig, layer: int) -> LayerQuantization:
    """How one layer's latents become codes."""
    quantization, ranks = latent.quantization, latent.layers[layer]
    return LayerQuantization(
        quantization.of(ranks.key, "key", layer),
        quantization.of(ranks.value, "value", layer),
        quantization.sinks,
        quantization.window,
    )


def latent_layers(
    config: PreTrainedConfig, max_length: int | None = None, capacity: int | None = None
) -> list[LatentLayer]:
    """One cache layer per decoder layer; layers of the same window share their positions."""
    latent = config.latent
    leaders: dict[int | None, LatentLayer] = {}
    layers = []
    for index in range(len(latent.layers)):
        window = layer_window(config, index)
        leader = leaders.get(window)
        codes = layer_quantization(latent, index)
        if capacity is not None:
            layer = FixedLatentLayer(capacity, leader, window, codes)
        else:
            layer = LatentLayer(leader, window, max_length, codes)
        leaders.setdefault(window, layer)
        layers.append(layer)
    return layers


class LatentCache(Cache):
    """Key latents (before RoPE), value latents and positions of every layer.

    `model.generate` makes one by itself. Pass your own to keep it between calls or to fix its capacity.

    Args:
        config: the compressed model's config.
        max_length: length that is known never to be exceeded; keeps the growth from overshooting it.
        capacity: allocate this many tokens once and never more (for CUDA graphs); grows freely if None.
    """

    def __init__(self, config: PreTrainedConfig, max_length: int | None = None, capacity: int | None = None) -> None:
        super().__init__(layers=latent_layers(config, max_length, capacity))

    def nbytes(self) -> int:
        """Bytes of all held latents and positions."""
        return cache_nbytes(self)

    def allocated_nbytes(self) -> int:
        """Bytes of memory behind them, the room to grow included."""
        return sum(layer.allocated_nbytes() for layer in self.layers)

    def bytes_per_token(self) -> float:
        """Held bytes per cached token of one row."""
        return cache_bytes_per_token(self)


def adopt_cache(cache: Cache, config: PreTrainedConfig) -> None:
    """Make an empty foreign cache (such as `DynamicCache()`) hold latents, in place.

    Raises:
        PaluError: if it already holds full keys and values, or quantises them.
    """
    if cache.layers and all(isinstance(layer, LatentLayer) and layer.keeps_positions for layer in cache.layers):
        return
    name = type(cache).__name__
    if any(layer.is_initialized for layer in cache.layers):
        raise PaluError(
            f"this {name} holds full keys and values; a compressed model needs an empty cache or LatentCache"
        )
    foreign = any(isinstance(layer, LatentLayer) for layer in cache.layers)
    if name == "QuantizedCache" or cache.offloading or foreign:
        raise PaluError(f"a compressed model cannot use {name} (quantised or offloaded); pass no cache or LatentCache")
    capacity = cache.get_max_length() if isinstance(cache, StaticCache) else None
    cache.layers = latent_layers(config, capacity=capacity)
    cache.layer_class_to_replicate = None


def cache_nbytes(cache: Cache) -> int:
    """Bytes that a cache holds: latents and positions, or keys and values of a transformers cache."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, LatentLayer):
            total += layer.nbytes()
        elif layer.keys is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def cache_bytes_per_token(cache: Cache) -> float:
    """Held bytes over (rows x tokens seen); 0 for an empty cache."""
    for layer in cache.layers:
        rows = layer.batch_size if isinstance(layer, LatentLayer) else (len(layer.keys) if layer.is_initialized else 0)
        length = int(layer.get_seq_length())
        if rows > 0 and length > 0:
            return cache_nbytes(cache) / (rows * length)
    return 0.0
