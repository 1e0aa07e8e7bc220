"""Stock and compressed models of well-known shapes with random weights: speed and memory need no download."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
LLAMA_3_8B = LLAMA_2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3-8b": LLAMA_3_8B,
    "mistral-7b": LLAMA_3_8B
    | {
        "model_type": "mistral",
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3-8b": LLAMA_3_8B
    | {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "tiny": LLAMA_2_7B
    | {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
}


def stock_model(shape: str, dtype: "torch.dtype", device: str, context: int | None = None) -> "PreTrainedModel":
    """A stock model with random weights.

    Args:
        shape: a key of `MODEL_SHAPES`.
        context: positions that it must have at least.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    entries = dict(MODEL_SHAPES[shape])
    entries["max_position_embeddings"] = max(entries["max_position_embeddings"], context or 0)
    config = AutoConfig.for_model(**entries)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def check_shares(args: argparse.Namespace) -> None:
    """Refuse sides that would keep nothing, or more than there is, and groups that do not divide the heads."""
    from palu.config import resolve_group_size
    from palu.core.errors import PaluError

    for side, share in (("keys", 1 - args.value_share), ("values", args.value_share)):
        if not 0 < 2 * args.kept_ratio * share <= 1:
            raise PaluError(
                f"--kept_ratio {args.kept_ratio:g} with --value_share {args.value_share:g} keeps "
                f"{2 * args.kept_ratio * share:.0%} of the {side}; it must be more than nothing and at most all"
            )
    resolve_group_size(args.group_size, MODEL_SHAPES[args.model_shape]["num_key_value_heads"], "--group_size")


def latent_model(
    stock: Any, dtype: "torch.dtype", device: str, kept_ratio: float, group_size: int, value_share: float = 0.5
) -> "PreTrainedModel":
    """A compressed model with random weights and equal ranks in every layer.

    Args:
        stock: the stock model's config.
        kept_ratio: cached numbers over the stock model's.
        group_size: kv heads per group.
        value_share: values' part of the cached numbers; ranks are rounded to multiples of 16.
    """
    import torch

    from palu.config import LatentConfig, LayerRanks, head_dim, resolve_group_size
    from palu.models import get_adapter

    kv_heads = stock.num_key_value_heads
    groups = kv_heads // resolve_group_size(group_size, kv_heads, "group size")
    full = kv_heads // groups * head_dim(stock)
    shares = (2 * kept_ratio * (1 - value_share), 2 * kept_ratio * value_share)
    key, value = (min(full, max(16, round(full * share / 16) * 16)) for share in shares)
    layers = (LayerRanks((key,) * groups, (value,) * groups),) * stock.num_hidden_layers
    adapter = get_adapter(stock)
    with torch.device(device):
        return adapter.causal_lm_class._from_config(
            adapter.latent_config(stock, LatentConfig(layers)), dtype=dtype
        ).eval()
