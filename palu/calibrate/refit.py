"""The output projections fitted again to what compressed attention hands them, layer after layer."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palu.calibrate.stream import Stop, embed, exact_products, through
from palu.core.errors import PaluError
from palu.core.progress import Progress, silent

# Weights of staying as it was that are tried, over the mean energy of what comes in.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


@torch.no_grad()
def refit_outputs(
    compressed: PreTrainedModel, original: PreTrainedModel, windows: Tensor, progress: Progress = silent
) -> None:
    """Give every o_proj of a compressed model the weights that come nearest to the original's outputs.

    Each layer sees what the compressed layers before it, fitted already, put out; the outputs that it should come near
    to are those of the original layer in the original model. With `a` what attention hands o_proj in the one and `y`
    what o_proj puts out in the other, the ridge regression

        least E|y - (W + D) a|^2 + r |D|^2,  D = E[(y - W a) a^T] (E[a a^T] + r I)^-1,

    changes nothing where nothing was lost. r is the one of RIDGES times the mean eigenvalue with which regressions on
    every other window best foretell the windows between, for half of the tokens; a layer that none of them helps is
    left as it is. The cache stays as it is. Values' up factors must not be folded yet.

    Args:
        compressed: its o_projs get new weights; tensors that it shares with the original are left alone.
        windows: token ids, int64 [windows, seqlen], two or more.

    Raises:
        PaluError: if an activation is not finite, naming the layer.
    """
    windows = windows.to(original.device)
    (wanted, wanted_arguments), (hidden, arguments) = embed(original, windows), embed(compressed, windows)
    layers = list(zip(original.model.layers, compressed.model.layers, wanted_arguments, arguments, strict=True))
    ticks = iter(progress(range(len(layers) * len(windows)), "refitting o_proj", len(layers) * len(windows)))
    for index, (layer, own, its_arguments, own_arguments) in enumerate(layers):
        output = own.self_attn.o_proj
        halves = [Sums(output), Sums(output)]
        for place in range(len(windows)):
            next(ticks)
            with _seen(layer.self_attn.o_proj) as expected:
                wanted[place] = through(layer, wanted[place], its_arguments)
            with _seen(output, stop=True) as found, suppress(Stop):
                through(own, hidden[place], own_arguments)
            halves[place % 2].add(found["inputs"], expected["outputs"].float() - found["outputs"].float())
        if not all(half.is_finite for half in halves):
            raise PaluError(f"NaN or infinity in the activations of layer {index} (o_proj)")
        weight = (output.weight.double() + best_change(*halves)).to(output.weight)
        output.weight = nn.Parameter(weight, output.weight.requires_grad)
        for place in range(len(windows)):
            hidden[place] = through(own, hidden[place], own_arguments)
    next(ticks, None)


class Sums:
    """Sums over tokens of what a linear map is given and of what it should put out besides."""

    def __init__(self, linear: nn.Linear) -> None:
        weight = linear.weight
        self.gram = weight.new_zeros(linear.in_features, linear.in_features, dtype=torch.float32)
        self.cross = weight.new_zeros(linear.out_features, linear.in_features, dtype=torch.float32)

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """inputs [..., in_features], missing [..., out_features] in float32."""
        inputs, missing = inputs.flatten(0, -2).float(), missing.flatten(0, -2)
        # What is missing has more digits than TF32, whatever the model's number format.
        with exact_products(torch.float32):
            self.gram.addmm_(inputs.T, inputs)
            self.cross.addmm_(missing.T, inputs)

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.gram).all() and torch.isfinite(self.cross).all())


def best_change(one: Sums, other: Sums) -> Tensor:
    """The change of the weight, float64 [out_features, in_features], that tokens of both halves ask for."""
    halves = [(each.gram.double(), each.cross.double()) for each in (one, other)]

    def squares(ridge: float) -> float:
        """How much more is missing of one half with the change that the other asks for."""
        total = 0.0
        for (gram, cross), (its_gram, its_cross) in (halves, halves[::-1]):
            change = ridge_change(gram, cross, ridge)
            total += ((change @ its_gram - 2 * its_cross) * change).sum().item()
        return total

    tried = {ridge: squares(ridge) for ridge in RIDGES}
    best = min(tried, key=tried.get)
    if tried[best] >= 0:
        return torch.zeros_like(halves[0][1])
    # Staying as it was weighs in all tokens together what it weighed in half of them.
    return ridge_change(*(sum(pair) for pair in zip(*halves, strict=True)), best / 2)


def ridge_change(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """`cross (gram + ridge * mean eigenvalue)^-1`, of sums [in, in] and [out, in]."""
    weight = ridge * gram.diagonal().mean().clamp_min(1e-300)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + weight * eye, cross.T).T


@contextmanager
def _seen(linear: nn.Linear, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """What goes into a linear map and comes out of it while the context is open; `stop`: nothing runs behind it."""
    seen: dict[str, Tensor] = {}

    def take(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(inputs=args[0], outputs=output)
        if stop:
            raise Stop

    handle = linear.register_forward_hook(take)
    try:
        yield seen
    finally:
        handle.remove()
