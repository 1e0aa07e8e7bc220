"""Low-rank KV-cache compression. Importing this package lets transformers load compressed checkpoints."""

from palu.calibrate.clip import search_clip_ratios
from palu.config import CompressionConfig
from palu.core.errors import PaluError
from palu.models import register_auto_classes
from palu.nn.fusion import fold_hadamard, fold_values, set_cache, set_quantization, set_token_sparsity
from palu.nn.latent_cache import LatentCache, cache_bytes_per_token, cache_nbytes
from palu.pipeline import Compression, compress
from palu.quantization import QuantizationConfig
from palu.token_sparsity import TokenSparsity

register_auto_classes()

__all__ = [
    "Compression",
    "CompressionConfig",
    "LatentCache",
    "PaluError",
    "QuantizationConfig",
    "TokenSparsity",
    "cache_bytes_per_token",
    "cache_nbytes",
    "compress",
    "fold_hadamard",
    "fold_values",
    "search_clip_ratios",
    "set_cache",
    "set_quantization",
    "set_token_sparsity",
]
