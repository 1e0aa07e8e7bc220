"""How much the model's predictions change when one projection drops directions, measured."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from palu.calibrate.sites import projection
from palu.calibrate.stream import embed, through
from palu.core.errors import PaluError
from palu.core.progress import Progress, silent
from palu.core.types import Factors, Projection, Site, by_projection

# Kept fractions of every group at which a projection is probed: closer where damage grows faster. At the first one
# nothing is lost but what rounding loses, which is no damage of the others.
FRACTIONS = (1.0, 0.6, 0.4, 0.25, 0.15, 0.08)
# Tokens of a window that are read, and logits of several windows at a time.
MOST_TOKENS = 1024
MOST_LOGITS = 1 << 27

Damage = dict[Projection, list[tuple[float, float]]]


@torch.no_grad()
def probe_damage(
    model: PreTrainedModel, factors: Mapping[Site, Factors], windows: Tensor, progress: Progress = silent
) -> Damage:
    """The predictions' mean Kullback-Leibler divergence from the model's own, one projection truncated at a time.

    All groups of a projection keep the same one of FRACTIONS. Damage never falls with the energy that is dropped.

    Args:
        factors: of full rank, of every site.
        windows: token ids, int64 [windows, seqlen]; the first MOST_TOKENS of each are read.

    Returns:
        For every projection pairs (energy that is dropped, nats per token), by rising energy, from nothing on.

    Raises:
        PaluError: if a divergence is not finite, naming the layer.
    """
    groups = {key: [factors[site] for site in sites] for key, sites in by_projection(factors).items()}
    probes = [(key, fraction) for key in groups for fraction in FRACTIONS]
    windows = windows[:, :MOST_TOKENS]
    size = max(1, MOST_LOGITS // (windows.shape[1] * model.config.vocab_size))
    batches = windows.to(model.device).split(size)
    nats = torch.zeros(len(probes), dtype=torch.float64)
    ticks = iter(progress(range(len(batches) * len(probes)), "probing projections", len(batches) * len(probes)))
    for batch in batches:
        stream = _Stream(model, batch)
        expected = stream.predictions(0)
        for index, (key, fraction) in enumerate(probes):
            next(ticks)
            with _truncated(model, key, [_kept(each, fraction) for each in groups[key]]):
                found = stream.predictions(key[0])
            nats[index] += F.kl_div(found, expected, reduction="sum", log_target=True).double().item()
    next(ticks, None)
    measured = nats.view(-1, len(FRACTIONS)) / windows.numel()
    for (layer, side), found in zip(groups, measured, strict=True):
        if not torch.isfinite(found).all():
            raise PaluError(f"layer {layer}: predictions with a truncated {side} projection are not finite")
    damage = (measured - measured[:, :1]).cummax(dim=1).values
    return {key: _points(groups[key], found) for key, found in zip(groups, damage.tolist(), strict=True)}


class _Stream:
    """A batch's hidden states before every layer, so that a change of a layer runs the later ones only."""

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        self.model = model
        hidden, self.arguments = embed(model, windows)
        self.before = [torch.cat(hidden)]
        for layer, arguments in zip(model.model.layers[:-1], self.arguments, strict=False):
            self.before.append(through(layer, self.before[-1], arguments))

    def predictions(self, first: int) -> Tensor:
        """Logarithms of the probabilities of every token's next one with the layers from `first` on as they are now."""
        hidden = self.before[first]
        for layer, arguments in zip(self.model.model.layers[first:], self.arguments[first:], strict=True):
            hidden = through(layer, hidden, arguments)
        return F.log_softmax(self.model.lm_head(self.model.model.norm(hidden)).float(), dim=-1)


def _points(groups: list[Factors], damage: list[float]) -> list[tuple[float, float]]:
    """(energy that is dropped at one of FRACTIONS, damage)."""
    dropped = [sum(each.energy[_rank(each, fraction) :].sum().item() for each in groups) for fraction in FRACTIONS]
    return list(zip(dropped, damage, strict=True))


def _rank(factors: Factors, fraction: float) -> int:
    return max(1, round(fraction * len(factors.energy)))


def _kept(factors: Factors, fraction: float) -> Factors:
    return factors.truncate(_rank(factors, fraction))


@contextmanager
def _truncated(model: PreTrainedModel, key: Projection, parts: list[Factors]) -> Iterator[None]:
    """The projection is that of the factors while the context is open."""
    linear = projection(model, *key)
    weight = torch.cat([part.up @ part.down for part in parts]).to(linear.weight)

    def replace(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.linear(args[0], weight, module.bias)

    handle = linear.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
