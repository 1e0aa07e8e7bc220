"""Second moments of every layer's key/value input, one layer in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palu.core.errors import PaluError
from palu.core.progress import Progress, silent


class _Stop(Exception):
    """Ends a layer's forward once its key/value input is known."""


def stream_grams(model: PreTrainedModel, windows: Tensor, progress: Progress = silent) -> Iterator[Tensor]:
    """Yield, for layer 0, 1, ..., the Gram `E[x x^T]` of the input that k_proj and v_proj share.

    The hidden states of all windows advance together, one decoder layer at a time, so that memory beyond the model is
    those hidden states and one Gram, whatever the depth. Products of 16-bit activations are exact in TF32 and in
    float32; sums are accumulated in float32.

    Args:
        windows: token ids, int64 [windows, seqlen].

    Yields:
        float32 [in_features, in_features] on the model's device.

    Raises:
        PaluError: if a Gram is not finite, naming the layer.
    """
    layers = model.model.layers
    with torch.no_grad():
        hidden, layer_arguments = _embed(model, windows.to(model.device))
    total = len(layers) * len(hidden)
    ticks = iter(progress(range(total), "input moments", total))
    for index, (layer, arguments) in enumerate(zip(layers, layer_arguments, strict=True)):
        gram = _advance(layer, arguments, hidden, ticks, stop=index == len(layers) - 1)
        if not torch.isfinite(gram).all():
            raise PaluError(f"NaN or infinity in the activations of layer {index} (input of k_proj)")
        yield gram / windows.numel()
    next(ticks, None)


@torch.no_grad()
def _advance(
    layer: nn.Module, arguments: dict[str, Any], hidden: list[Tensor], ticks: Iterator[int], stop: bool
) -> Tensor:
    """Replace every hidden state by the layer's output; returns the sum of `x x^T` over its key/value inputs.

    With `stop` the layer ends once that input is known, and the hidden states are dropped.
    """
    weight = layer.self_attn.k_proj.weight
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float32, device=weight.device)
    with _exact_products(weight.dtype), _accumulate(layer.self_attn.k_proj, gram, stop):
        for index in range(len(hidden)):
            next(ticks)
            try:
                output = layer(hidden[index], **arguments)
                hidden[index] = output[0] if isinstance(output, tuple) else output
            except _Stop:
                hidden[index] = None
    return gram


@contextmanager
def _accumulate(projection: nn.Module, gram: Tensor, stop: bool) -> Iterator[None]:
    """Add the projection's input to `gram` while the context is open."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].reshape(-1, gram.shape[0]).float()
        gram.addmm_(inputs.T, inputs)
        if stop:
            raise _Stop

    handle = projection.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _embed(model: PreTrainedModel, windows: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Hidden states before layer 0, [1, seqlen, hidden] per window, and every layer's other arguments.

    The arguments (positions, rotation, mask) are those that the model itself passes in a forward of one window; they
    are the same for every window.
    """
    arguments: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments.append(kwargs)
        if len(arguments) == len(model.model.layers):
            raise _Stop

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        model.model(input_ids=windows[:1], use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [model.model.embed_tokens(window[None]) for window in windows], arguments


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Allow TF32 for the Gram exactly where it loses nothing: inputs that have at most its 10 mantissa bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype in (torch.bfloat16, torch.float16)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
