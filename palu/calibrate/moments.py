"""Second moments of every layer's key/value input and of its queries, one layer in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palu.calibrate.stream import Stop, embed, exact_products, through
from palu.config import head_dim
from palu.core.errors import PaluError
from palu.core.progress import Progress, silent


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
    hidden, layer_arguments = embed(model, windows.to(model.device))
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
    with exact_products(layer.self_attn.k_proj.weight.dtype), _accumulate(layer.self_attn, sums, stop):
        for index in range(len(hidden)):
            next(ticks)
            try:
                hidden[index] = through(layer, hidden[index], arguments)
            except Stop:
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
            raise Stop

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
