"""Low-rank KV-cache compression. Importing this package lets transformers load compressed checkpoints."""

from palu.config import CompressionConfig, QuantizationConfig
from palu.core.errors import PaluError
from palu.models import register_auto_classes
from palu.nn.fusion import fold_hadamard, set_quantization
from palu.nn.latent_cache import LatentCache, cache_bytes_per_token, cache_nbytes
from palu.pipeline import Compression, compress

register_auto_classes()

__all__ = [
    "Compression",
    "CompressionConfig",
    "LatentCache",
    "PaluError",
    "QuantizationConfig",
    "cache_bytes_per_token",
    "cache_nbytes",
    "compress",
    "fold_hadamard",
    "set_quantization",
]
