"""The cache of a compressed model: a transformers Cache whose layers hold latents."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, StaticCache

from palu.config import LatentConfig, LayerRanks
from palu.core.errors import PaluError
from palu.core.validate import require
from palu.nn.fixed_layer import FixedLatentLayer
from palu.nn.latent_layer import LatentLayer, LayerQuantization
from palu.nn.sparse_layer import SparseLatentLayer
from palu.sparse.base import TokenPolicy
from palu.sparse.registry import get_policy


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
    if latent.sparsity is not None:
        require(capacity is None, "a cache of fixed capacity cannot drop tokens; give no token_sparse_method")
        return sparse_layers(config, get_policy(latent.sparsity), max_length)
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


def token_groups(ranks: LayerRanks, policy: TokenPolicy) -> list[tuple[int, int]]:
    """Widths of the key and value latents of heads that keep their own tokens.

    A token group has whole key groups and whole value groups; where a policy does not look at them, all heads are one.
    """
    count = math.gcd(len(ranks.key), len(ranks.value)) if policy.needs_votes else 1
    sides = [
        [sum(side[part * len(side) // count :][: len(side) // count]) for part in range(count)]
        for side in (ranks.key, ranks.value)
    ]
    return list(zip(*sides, strict=True))


def sparse_layers(
    config: PreTrainedConfig, policy: TokenPolicy, max_length: int | None = None
) -> list[SparseLatentLayer]:
    """One cache layer per decoder layer that keeps the tokens that `policy` chooses."""
    latent = config.latent
    return [
        SparseLatentLayer(
            policy,
            index,
            len(latent.layers),
            token_groups(ranks, policy),
            layer_window(config, index),
            max_length,
            layer_quantization(latent, index),
        )
        for index, ranks in enumerate(latent.layers)
    ]


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
        self.limits = (max_length, capacity)
        self.settings = cache_settings(config)

    def nbytes(self) -> int:
        """Bytes of all held latents and positions."""
        return cache_nbytes(self)

    def allocated_nbytes(self) -> int:
        """Bytes of memory behind them, the room to grow included."""
        return sum(layer.allocated_nbytes() for layer in self.layers)

    def bytes_per_token(self) -> float:
        """Held bytes per cached token of one row."""
        return cache_bytes_per_token(self)


def cache_settings(config: PreTrainedConfig) -> tuple[dict | None, ...]:
    """What a cache holds is kept by, beside the ranks; setting others replaces it."""
    return tuple(config.palu.get(name) for name in ("quantization", "sparsity", "hadamard"))


def adopt_cache(cache: Cache, config: PreTrainedConfig) -> None:
    """Make an empty foreign cache (such as `DynamicCache()`) hold latents, in place.

    An empty one that was made before the model's codes or token policy changed is made anew.

    Raises:
        PaluError: if it already holds full keys and values, or quantises them, or latents kept by other settings.
    """
    if cache.layers and all(isinstance(layer, LatentLayer) and layer.keeps_positions for layer in cache.layers):
        # A compiled step's cache has been here before, with the prompt. One built of layers by hand says nothing.
        if torch.compiler.is_compiling() or getattr(cache, "settings", None) in (None, cache_settings(config)):
            return
        if any(int(layer.get_seq_length()) > 0 for layer in cache.layers):
            raise PaluError("this cache was filled before the model's codes or token policy changed; pass a new one")
        cache.layers, cache.settings = latent_layers(config, *cache.limits), cache_settings(config)
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
    cache.limits, cache.settings = (None, capacity), cache_settings(config)
    cache.layers = latent_layers(config, *cache.limits)
    cache.layer_class_to_replicate = None


def new_token_mask(cache: Cache | None, attention_mask: Tensor | None, new: int) -> Tensor | None:
    """Which of the new tokens of a cache that drops tokens are none but padding, bool [batch, new]; None: all are.

    Raises:
        PaluError: if the model's attention mask does not say.
    """
    sparse = cache is not None and any(isinstance(layer, SparseLatentLayer) for layer in cache.layers)
    if not sparse or attention_mask is None:
        return None
    require(
        isinstance(attention_mask, Tensor) and attention_mask.ndim == 2,
        "a cache that drops tokens needs an attention mask [batch, length]; masks of every layer are not for it",
    )
    mask = attention_mask[:, -new:].bool()
    # Where one new token follows, asking a GPU would cost more than the token.
    return None if new == 1 or bool(mask.all()) else mask


def check_dropped(cache: Cache | None, new: int) -> None:
    """Refuse to go on if a token policy was set and did nothing after `new` tokens.

    Raises:
        PaluError: naming the layer.
    """
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, SparseLatentLayer):
            layer.check_dropped(new)


def cache_nbytes(cache: Cache) -> int:
    """Bytes that a cache holds: latents and positions, or keys and values of a transformers cache."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, LatentLayer):
            total += layer.nbytes()
        elif layer.keys is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def has_dropped(cache: Cache | None) -> bool:
    """Whether a token policy has dropped tokens of a cache."""
    return cache is not None and any(isinstance(each, SparseLatentLayer) and each.has_dropped for each in cache.layers)


def cache_bytes_per_token(cache: Cache) -> float:
    """Held bytes over (rows x tokens seen); 0 for an empty cache."""
    for layer in cache.layers:
        rows = layer.batch_size if isinstance(layer, LatentLayer) else (len(layer.keys) if layer.is_initialized else 0)
        length = int(layer.get_seq_length())
        if rows > 0 and length > 0:
            return cache_nbytes(cache) / (rows * length)
    return 0.0
