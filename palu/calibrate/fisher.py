"""Fisher information of the key and value projections: of their weights, and of what they put out."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from palu.calibrate.gradients import stream_gradients, text_loss
from palu.calibrate.sites import projection
from palu.config import head_dim
from palu.core.errors import PaluError
from palu.core.progress import Progress, silent
from palu.core.types import SIDES, Projection, Side


def fisher_information(model: PreTrainedModel, windows: Tensor, progress: Progress = silent) -> dict[Side, Tensor]:
    """Mean over a head's weights of `sqrt(E[g^2])`, g the gradient of a window's language-model loss.

    (Palu, section 3.3; the diagonal Fisher information.) Only the key and value projections' gradients are formed, each
    as `dY^T X`, squared into a running sum. Labels are shifted once.

    Args:
        windows: token ids, int64 [windows, seqlen].

    Returns:
        For each side float64 [layers, kv_heads]; a group's score is the mean over its heads.

    Raises:
        PaluError: if a gradient is not finite, naming the layer.
    """
    squared = {key: torch.zeros_like(linear.weight, dtype=torch.float32) for key, linear in _projections(model)}

    def take(key: Projection, inputs: Tensor, gradient: Tensor) -> None:
        of_weights = gradient.T @ inputs.float()
        squared[key].addcmul_(of_weights, of_weights)

    stream_gradients(model, dict(_projections(model)), windows, text_loss, take, progress, "Fisher information")
    return {side: _reduce(model, squared, side, windows) for side in SIDES}


def output_fisher(
    model: PreTrainedModel, windows: Tensor, groups: dict[Side, int], seed: int, progress: Progress = silent
) -> dict[Projection, Tensor]:
    """`E[g g^T]` over tokens, g the gradient of a window's loss by what a head group's projection puts out at a token.

    The loss is that of tokens drawn from the model's own predictions, so that g's second moment is the Fisher
    information: small errors e of independent tokens raise the Kullback-Leibler divergence of the predictions by
    `1/2 E[(g . e)^2]` nats per token. (The output side of K-FAC, arXiv 1503.05671.)

    Args:
        windows: token ids, int64 [windows, seqlen].
        groups: head groups of each side.
        seed: draws the tokens.

    Returns:
        For each projection float32 [groups, group_dim, group_dim], on the model's device.

    Raises:
        PaluError: if a gradient is not finite, naming the layer.
    """
    sums = {}
    for key, linear in _projections(model):
        count = groups[key[1]]
        sums[key] = linear.weight.new_zeros(count, *[linear.out_features // count] * 2, dtype=torch.float32)
    generator = torch.Generator(model.device).manual_seed(seed)

    def loss(logits: Tensor, window: Tensor) -> Tensor:
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        return F.cross_entropy(logits, drawn, reduction="sum")

    def take(key: Projection, inputs: Tensor, gradient: Tensor) -> None:
        by_group = gradient.unflatten(1, (groups[key[1]], -1)).transpose(0, 1)
        sums[key].baddbmm_(by_group.transpose(1, 2), by_group)

    stream_gradients(
        model, dict(_projections(model)), windows, loss, take, progress, "Fisher information of keys and values"
    )
    for key, total in sums.items():
        _check_finite(total.div_(windows.numel()), key)
    return sums


def _projections(model: PreTrainedModel) -> list[tuple[Projection, torch.nn.Linear]]:
    layers = range(model.config.num_hidden_layers)
    return [((layer, side), projection(model, layer, side)) for layer in layers for side in SIDES]


def _check_finite(numbers: Tensor, key: Projection) -> None:
    layer, side = key
    if not torch.isfinite(numbers).all():
        raise PaluError(f"NaN or infinity in the {side} gradients of layer {layer}")


def _reduce(model: PreTrainedModel, squared: dict[Projection, Tensor], side: Side, windows: Tensor) -> Tensor:
    """[layers, kv_heads] from the sums of squared gradients."""
    count, predicted = windows.shape[0], windows.shape[1] - 1
    scores = []
    for layer in range(model.config.num_hidden_layers):
        root_mean_square = (squared[layer, side].double() / count).sqrt() / predicted
        _check_finite(root_mean_square, (layer, side))
        by_head = root_mean_square.view(-1, head_dim(model.config) * root_mean_square.shape[1])
        scores.append(by_head.mean(dim=1).cpu())
    return torch.stack(scores)
