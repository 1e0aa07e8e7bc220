"""Fisher information of the key and value projections."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from palu.calibrate.sites import projection
from palu.config import head_dim
from palu.core.errors import PaluError
from palu.core.progress import Progress, silent
from palu.core.types import SIDES, Side

Key = tuple[int, Side]


def fisher_information(model: PreTrainedModel, windows: Tensor, progress: Progress = silent) -> dict[Side, Tensor]:
    """Mean over a head's weights of `sqrt(E[g^2])`, g the gradient of a window's language-model loss.

    (Palu, section 3.3; the diagonal Fisher information.) Only the key and value projections' gradients are formed, each
    as `dY^T X` from a hook, squared into a running sum: no `.grad` is ever stored. Labels are shifted once.

    Args:
        windows: token ids, int64 [windows, seqlen].

    Returns:
        For each side float64 [layers, kv_heads]; a group's score is the mean over its heads.

    Raises:
        PaluError: if a gradient is not finite, naming the layer.
    """
    squared: dict[Key, Tensor] = {}
    with torch.enable_grad(), _frozen(model), _gradient_hooks(model, squared):
        for window in progress(windows.to(model.device), "Fisher information", len(windows)):
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            # The sum, not the mean: larger gradients survive 16-bit arithmetic; the division comes at the end.
            F.cross_entropy(logits, window[1:], reduction="sum").backward()
    return {side: _reduce(model, squared, side, windows) for side in SIDES}


def _reduce(model: PreTrainedModel, squared: dict[Key, Tensor], side: Side, windows: Tensor) -> Tensor:
    """[layers, kv_heads] from the sums of squared gradients."""
    count, predicted = windows.shape[0], windows.shape[1] - 1
    scores = []
    for layer in range(model.config.num_hidden_layers):
        root_mean_square = (squared[layer, side].double() / count).sqrt() / predicted
        if not torch.isfinite(root_mean_square).all():
            raise PaluError(f"NaN or infinity in the {side} gradients of layer {layer}")
        by_head = root_mean_square.view(-1, head_dim(model.config) * root_mean_square.shape[1])
        scores.append(by_head.mean(dim=1).cpu())
    return torch.stack(scores)


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
def _gradient_hooks(model: PreTrainedModel, squared: dict[Key, Tensor]) -> Iterator[None]:
    """Add each backward pass's squared weight gradients to `squared[layer, side]`."""
    handles = []
    for layer in range(model.config.num_hidden_layers):
        for side in SIDES:
            linear = projection(model, layer, side)
            squared[layer, side] = torch.zeros_like(linear.weight, dtype=torch.float32)
            handles.append(linear.register_forward_hook(_watch_output(squared[layer, side])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_output(total: Tensor):  # noqa: ANN202 (a hook; its type says nothing)
    def forward_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].detach()[0]

        def backward_hook(gradient: Tensor) -> None:
            weight_gradient = gradient[0].float().T @ inputs.float()
            total.addcmul_(weight_gradient, weight_gradient)

        output.register_hook(backward_hook)

    return forward_hook
