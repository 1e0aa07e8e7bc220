"""A step of the output projections towards the calibration text, as large as leaves predictions nearly as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from palu.calibrate.gradients import stream_gradients
from palu.calibrate.refit import Sums, ridge_change
from palu.core.errors import PaluError
from palu.core.progress import Progress, silent

# Tokens of a window that are read, windows that the step is made of, and windows that it is tried on, at most.
MOST_TOKENS, MOST_WINDOWS, MOST_TRIED = 1024, 32, 8
# The first step that is tried, as a share of the weights; each one after it is twice as large.
FIRST_STEP, MOST_STEPS = 2.0**-14, 14
# Damping, over the mean energy of what comes in.
RIDGE = 1.0


def adapt_outputs(
    compressed: PreTrainedModel, original: PreTrainedModel, windows: Tensor, share: float, progress: Progress = silent
) -> float:
    """Move every o_proj of a compressed model a little towards lower loss on the calibration text.

    With `a` what an o_proj is given and `g` the gradient of the text's loss by what it puts out, the direction is

        D = -E[g a^T] (E[a a^T] + r I)^-1 / E[|g|^2],

    a natural gradient with the Fisher information of `g` as a multiple of the identity (K-FAC, arXiv 1503.05671). All
    layers take the same multiple of it: the largest one tried at which, on windows that it was not made of, the mean
    Kullback-Leibler divergence of the predictions from the original's is at most 1 + share times what it was, and the
    loss falls. That is none where nothing was lost. A divergence of second order buys a loss of first order, so a small
    share is much on the domain of the calibration text. The cache stays as it is.

    Args:
        compressed: its o_projs get new weights; tensors that it shares with the original are left alone.
        windows: token ids, int64 [windows, seqlen], two or more; every fourth is one to try the step on.

    Returns:
        The loss that the step gains on the windows it was tried on, in nats per token.

    Raises:
        PaluError: if a gradient is not finite, naming the layer.
    """
    windows = windows[:, :MOST_TOKENS].to(compressed.device)
    tried = torch.arange(len(windows)) % 4 == 1
    held, used = windows[tried][:MOST_TRIED], windows[~tried][:MOST_WINDOWS]
    outputs = [layer.self_attn.o_proj for layer in compressed.model.layers]
    directions = _directions(compressed, outputs, used, progress)
    before = [output.weight for output in outputs]
    unit = min(
        weight.norm().item() / max(direction.norm().item(), 1e-300)
        for weight, direction in zip(before, directions, strict=True)
    )
    step, (first_loss, divergence) = 0.0, _compare(compressed, original, held)
    loss = first_loss
    for doubling in progress(range(MOST_STEPS), "adapting o_proj", MOST_STEPS):
        size = FIRST_STEP * 2**doubling * unit
        with _stepped(outputs, before, directions, size):
            found, moved = _compare(compressed, original, held)
        if not (found < loss and moved <= (1 + share) * divergence):
            break
        step, loss = size, found
    for output, weight, direction in zip(outputs, before, directions, strict=True):
        output.weight = nn.Parameter(_moved(weight, direction, step), weight.requires_grad)
    return first_loss - loss


def _directions(model: PreTrainedModel, outputs: list[nn.Linear], windows: Tensor, progress: Progress) -> list[Tensor]:
    """Of every layer's o_proj, float64 [out_features, in_features]."""
    sums = [Sums(output) for output in outputs]
    energy = [0.0] * len(outputs)

    def loss(logits: Tensor, window: Tensor) -> Tensor:
        return F.cross_entropy(logits[:-1], window[1:], reduction="sum")

    def take(layer: int, inputs: Tensor, gradient: Tensor) -> None:
        sums[layer].add(inputs, -gradient)
        energy[layer] += gradient.double().square().sum().item()

    stream_gradients(model, dict(enumerate(outputs)), windows, loss, take, progress, "gradients of o_proj")
    for layer, each in enumerate(sums):
        if not each.is_finite:
            raise PaluError(f"NaN or infinity in the gradients of layer {layer} (o_proj)")
    return [
        ridge_change(each.gram.double(), each.cross.double(), RIDGE) / max(total / windows.numel(), 1e-300)
        for each, total in zip(sums, energy, strict=True)
    ]


@torch.no_grad()
def _compare(compressed: PreTrainedModel, original: PreTrainedModel, windows: Tensor) -> tuple[float, float]:
    """A model's loss on windows, and its predictions' divergence from the original's, in nats per token."""
    loss = divergence = 0.0
    for window in windows:
        found, expected = (
            model(window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            for model in (compressed, original)
        )
        loss += F.nll_loss(found, window[1:], reduction="sum").item()
        divergence += F.kl_div(found, expected, reduction="sum", log_target=True).item()
    count = len(windows) * (windows.shape[1] - 1)
    return loss / count, divergence / count


def _moved(weight: Tensor, direction: Tensor, step: float) -> Tensor:
    return (weight.double() + step * direction).to(weight)


@contextmanager
def _stepped(outputs: list[nn.Linear], weights: list[Tensor], directions: list[Tensor], step: float) -> Iterator[None]:
    """The output projections a step further while the context is open."""
    for output, weight, direction in zip(outputs, weights, directions, strict=True):
        output.weight = nn.Parameter(_moved(weight, direction, step), requires_grad=False)
    try:
        yield
    finally:
        for output, weight in zip(outputs, weights, strict=True):
            output.weight = weight
