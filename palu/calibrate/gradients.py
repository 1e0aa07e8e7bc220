"""Gradients of what linear maps put out, as a backward pass makes them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from palu.core.progress import Progress

Key = TypeVar("Key")
# loss(logits [seqlen, vocabulary] in float32, window [seqlen]): a sum over tokens, not a mean, of which larger
# gradients survive 16-bit arithmetic.
Loss = Callable[[Tensor, Tensor], Tensor]
# take(which, inputs [seqlen, in_features] as they are, gradient [seqlen, out_features] in float32).
Taker = Callable[[Key, Tensor, Tensor], None]


def text_loss(logits: Tensor, window: Tensor) -> Tensor:
    """Of the text's own next tokens, whose labels are shifted once."""
    return F.cross_entropy(logits[:-1], window[1:], reduction="sum")


def stream_gradients(
    model: PreTrainedModel,
    linears: Mapping[Key, nn.Linear],
    windows: Tensor,
    loss: Loss,
    take: Taker[Key],
    progress: Progress,
    name: str,
) -> None:
    """Hand every window's gradients of what the model's `linears` put out over; no `.grad` is ever stored.

    Args:
        windows: token ids, int64 [windows, seqlen].
    """
    with torch.enable_grad(), _frozen(model), _watched(linears, take):
        for window in progress(windows.to(model.device), name, len(windows)):
            loss(model(window[None], use_cache=False).logits[0].float(), window).backward()


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter requires a gradient; the embedded tokens do, so that the backward pass reaches every layer."""
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()
        for parameter, requires_grad in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(requires_grad)


@contextmanager
def _watched(linears: Mapping[Key, nn.Linear], take: Taker[Key]) -> Iterator[None]:
    """`take` is given every backward pass's gradients."""
    handles = [linear.register_forward_hook(_watch_output(key, take)) for key, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_output(which: Key, take: Taker[Key]):  # noqa: ANN202 (a hook; its type says nothing)
    def forward_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].detach()[0]
        output.register_hook(lambda gradient: take(which, inputs, gradient[0].float()))

    return forward_hook
