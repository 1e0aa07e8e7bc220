"""Low-rank KV-cache compression. Importing this package lets transformers load compressed checkpoints."""

from palu.models import register_auto_classes
from palu.nn.latent_cache import LatentCache, cache_bytes_per_token, cache_nbytes

register_auto_classes()

__all__ = ["LatentCache", "cache_bytes_per_token", "cache_nbytes"]
