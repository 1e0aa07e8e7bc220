"""All calibration windows advance through a model together, one decoder layer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Stop(Exception):
    """Ends a forward pass once all that is wanted of it is known."""


@torch.no_grad()
def embed(model: PreTrainedModel, windows: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Hidden states before layer 0, [1, seqlen, hidden] per window, and every layer's other arguments.

    The arguments (positions, rotation, mask) are those that the model itself passes in a forward of one window; they
    are the same for every window.
    """
    arguments: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments.append(kwargs)
        if len(arguments) == len(model.model.layers):
            raise Stop

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        model.model(input_ids=windows[:1], use_cache=False)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [model.model.embed_tokens(window[None]) for window in windows], arguments


def through(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The hidden states behind a decoder layer."""
    output = layer(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Allow TF32 for products of activations exactly where it loses nothing: they have at most its 10 mantissa bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype in (torch.bfloat16, torch.float16)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
