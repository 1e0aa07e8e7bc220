"""A step of the output projections towards the calibration text, as large as leaves predictions nearly as they are."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from palu.calibrate.damage import MOST_TOKENS
from palu.calibrate.gradients import stream_gradients, text_loss
from palu.calibrate.refit import Sums, ridge_change
from palu.core.errors import PaluError
from palu.core.progress import Progress, silent

# Windows that the step is made of, and windows that it is tried on, at most.
MOST_WINDOWS, MOST_TRIED = 32, 8
# The first step that is tried, as a share of the weights, how much smaller each next one is, and how many there are.
FIRST_STEP, SMALLER, MOST_STEPS = 0.5, 0.5, 14
# Damping, over the mean energy of what comes in.
RIDGE = 1.0


@dataclass(frozen=True)
class Adaptation:
    """What a step did on the windows that it was tried on.

    step: as a share of the weights, of the layer that moved most; 0 if nothing moved.
    loss, adapted_loss: before and after it, of the text, in nats per token.
    divergence, adapted_divergence: of predictions from the original's (Kullback-Leibler), in nats per token.
    """

    step: float
    loss: float
    adapted_loss: float
    divergence: float
    adapted_divergence: float


def adapt_outputs(
    compressed: PreTrainedModel, original: PreTrainedModel, windows: Tensor, share: float, progress: Progress = silent
) -> Adaptation:
    """Move every o_proj of a compressed model a little towards lower loss on the calibration text.

    With `a` what an o_proj is given and `g` the gradient of the text's loss by what it puts out, the direction is

        D = -E[g a^T] (E[a a^T] + r I)^-1 / E[|g|^2],

    a natural gradient with the Fisher information of `g` as a multiple of the identity (K-FAC, arXiv 1503.05671). All
    layers take the same multiple of it: the largest of those tried at which, on windows that it was not made of, the
    mean Kullback-Leibler divergence of the predictions from the original's is at most 1 + share times what it was, and
    the loss is lower. That is none where nothing was lost. A divergence of second order buys a loss of first order, so
    a small share is much on the domain of the calibration text. The cache stays as it is.

    Args:
        compressed: its o_projs get new weights; tensors that it shares with the original are left alone.
        windows: token ids, int64 [windows, seqlen], two or more; every fourth is one to try the step on.

    Raises:
        PaluError: if a gradient is not finite, naming the layer, or the loss is not.
    """
    windows = windows[:, :MOST_TOKENS].to(compressed.device)
    tried = torch.arange(len(windows)) % 4 == 1
    outputs = [layer.self_attn.o_proj for layer in compressed.model.layers]
    directions = _directions(compressed, outputs, windows[~tried][:MOST_WINDOWS], progress)
    before = [output.weight for output in outputs]
    trial = _Trial(compressed, original, windows[tried][:MOST_TRIED])
    loss, divergence = trial.measure()
    if not math.isfinite(loss + divergence):
        raise PaluError("the compressed model's predictions of the calibration text are not finite")
    ticks = iter(progress(range(MOST_STEPS), "adapting o_proj", MOST_STEPS))
    chosen = Adaptation(0.0, loss, loss, divergence, divergence)
    unit = _unit(before, directions)
    for number, _ in enumerate(ticks):
        step = FIRST_STEP * SMALLER**number
        with _stepped(outputs, before, directions, step * unit):
            found, moved = trial.measure()
        if found < loss and moved <= (1 + share) * divergence:
            chosen = Adaptation(step, loss, found, divergence, moved)
            break
    for _ in ticks:
        pass
    if chosen.step > 0:
        for output, weight, direction in zip(outputs, before, directions, strict=True):
            moved_weight = _moved(weight, direction, chosen.step * unit)
            output.weight = nn.Parameter(moved_weight, weight.requires_grad)
    return chosen


def _unit(weights: list[Tensor], directions: list[Tensor]) -> float:
    """The multiple of the directions that is as large as the weights of the layer that it moves most."""
    norms = [(weight.norm().item(), each.norm().item()) for weight, each in zip(weights, directions, strict=True)]
    return min((own / other for own, other in norms if own > 0 and other > 0), default=0.0)


def _directions(model: PreTrainedModel, outputs: list[nn.Linear], windows: Tensor, progress: Progress) -> list[Tensor]:
    """Of every layer's o_proj, float32 [out_features, in_features]."""
    sums = [Sums(output) for output in outputs]
    energy = [0.0] * len(outputs)

    def take(layer: int, inputs: Tensor, gradient: Tensor) -> None:
        sums[layer].add(inputs, -gradient)
        energy[layer] += gradient.double().square().sum().item()

    stream_gradients(model, dict(enumerate(outputs)), windows, text_loss, take, progress, "gradients of o_proj")
    directions = []
    for layer, total in enumerate(energy):
        # One layer's sums after the other are let go of.
        each = sums.pop(0)
        if not each.is_finite:
            raise PaluError(f"NaN or infinity in the gradients of layer {layer} (o_proj)")
        change = ridge_change(each.gram.double(), each.cross.double(), RIDGE)
        directions.append((change / max(total / windows.numel(), 1e-300)).float())
    return directions


class _Trial:
    """What a model that changes makes of some windows, beside the original, of which hidden states are kept."""

    @torch.no_grad()
    def __init__(self, compressed: PreTrainedModel, original: PreTrainedModel, windows: Tensor) -> None:
        self.model, self.head, self.windows = compressed, original.lm_head, windows
        self.hidden = [original.model(window[None], use_cache=False).last_hidden_state for window in windows]

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """The loss, and the predictions' divergence from the original's, in nats per token."""
        loss = divergence = 0.0
        for window, hidden in zip(self.windows, self.hidden, strict=True):
            logits = self.model(window[None], use_cache=False).logits, self.head(hidden)
            found, expected = (each[0, :-1].float().log_softmax(-1) for each in logits)
            loss += F.nll_loss(found, window[1:], reduction="sum").item()
            divergence += F.kl_div(found, expected, reduction="sum", log_target=True).item()
        count = len(self.windows) * (self.windows.shape[1] - 1)
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
