"""Second moments of every layer's key/value input and of its queries, one layer in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palu.config import head_dim
from palu.core.errors import PaluError
from palu.core.progress import Progress, silent


class _Stop(Exception):
    """Ends a layer's forward once its key/value input and its queries are known."""


class LayerMoments(NamedTuple):
    """Means over the calibration tokens of one layer, float32.

    gram: `E[x x^T]` of the input that k_proj and v_proj share, [in_features, in_features].
    mean: `E[x]`, [in_features].
    query_gram: `E[q q^T]` of the queries that meet keys, before they are rotated, added up over each kv head's query
        heads, [kv_heads, head_dim, head_dim].
    """

    gram: Tensor
    mean: Tensor
    query_gram: Tensor


def stream_moments(model: PreTrainedModel, windows: Tensor, progress: Progress = silent) -> Iterator[LayerMoments]:
    """Yield the moments of layer 0, 1, ...

    The hidden states of all windows advance together, one decoder layer at a time, so that memory beyond the model is
    those hidden states and one Gram, whatever the depth. Products of 16-bit activations are exact in TF32 and in
    float32; sums are accumulated in float32.

    Args:
        windows: token ids, int64 [windows, seqlen].

    Yields:
        `LayerMoments` on the model's device.

    Raises:
        PaluError: if one is not finite, naming the layer.
    """
    layers = model.model.layers
    with torch.no_grad():
        hidden, layer_arguments = _embed(model, windows.to(model.device))
    total = len(layers) * len(hidden)
    ticks = iter(progress(range(total), "input moments", total))
    for index, (layer, arguments) in enumerate(zip(layers, layer_arguments, strict=True)):
        sums = _zeros(model, layer)
        _advance(layer, arguments, hidden, ticks, sums, stop=index == len(layers) - 1)
        if not all(torch.isfinite(each).all() for each in sums):
            raise PaluError(f"NaN or infinity in the activations of layer {index} (input of k_proj or queries)")
        yield LayerMoments(*(each / windows.numel() for each in sums))
    next(ticks, None)


@torch.no_grad()
def _advance(
    layer: nn.Module, arguments: dict[str, Any], hidden: list[Tensor], ticks: Iterator[int], sums: LayerMoments,
    stop: bool,
) -> None:  # fmt: skip
    """Replace every hidden state by the layer's output and add to the sums of its moments.

    With `stop` the layer ends once its key/value input and its queries are known, and the hidden states are dropped.
    """
    with _exact_products(layer.self_attn.k_proj.weight.dtype), _accumulate(layer.self_attn, sums, stop):
        for index in range(len(hidden)):
            next(ticks)
            try:
                output = layer(hidden[index], **arguments)
                hidden[index] = output[0] if isinstance(output, tuple) else output
            except _Stop:
                hidden[index] = None


def _zeros(model: PreTrainedModel, layer: nn.Module) -> LayerMoments:
    weight, size = layer.self_attn.k_proj.weight, head_dim(model.config)
    width, kv_heads = weight.shape[1], model.config.num_key_value_heads
    shapes = ((width, width), (width,), (kv_heads, size, size))
    return LayerMoments(*(torch.zeros(shape, dtype=torch.float32, device=weight.device) for shape in shapes))


@contextmanager
def _accumulate(attention: nn.Module, sums: LayerMoments, stop: bool) -> Iterator[None]:
    """Add what goes into the attention's keys, and its queries, to the sums while the context is open."""
    seen = set()

    def done(what: str) -> None:
        seen.add(what)
        if stop and len(seen) == 2:
            seen.clear()
            raise _Stop

    def add_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].reshape(-1, sums.gram.shape[0]).float()
        sums.gram.addmm_(inputs.T, inputs)
        sums.mean.add_(inputs.sum(0))
        done("inputs")

    def add_queries(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kv_heads, size, _ = sums.query_gram.shape
        queries = output.reshape(output.shape[0] * output.shape[1], kv_heads, -1, size).float()
        queries = queries.transpose(0, 1).flatten(1, 2)
        sums.query_gram.baddbmm_(queries.transpose(1, 2), queries)
        done("queries")

    # Queries as keys meet them: normalised, where they are.
    queries = getattr(attention, "q_norm", attention.q_proj)
    handles = [attention.k_proj.register_forward_pre_hook(add_inputs), queries.register_forward_hook(add_queries)]
    try:
        yield
    finally:
        for handle in handles:
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
