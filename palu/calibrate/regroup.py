"""Which kv heads share a latent: those whose keys lose least together, put side by side in the weights."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palu.calibrate.metrics import site_metric
from palu.calibrate.moments import LayerMoments
from palu.calibrate.sites import site_weight
from palu.config import CompressionConfig, head_dim
from palu.core.linalg import roots
from palu.core.types import Site, SiteShape
from palu.decompose import get_decomposition
from palu.models.rebuilt import rebuilt

# Up to so many ways to share heads out all are tried.
MOST_WAYS = 100
# Rounds of swaps between groups.
MOST_ROUNDS = 20

Groups = list[tuple[int, ...]]


def head_order(
    model: PreTrainedModel,
    config: CompressionConfig,
    layer: int,
    moments: LayerMoments | None,
    distances: int,
    energy_lost: Callable[[Tensor], float],
) -> list[int]:
    """The order of a layer's kv heads, `config.head_group_size` of them side by side, that keeps most of the keys.

    What a group loses is told by its energies (`palu.core.linalg.energy_factors`), with the errors' metric where the
    decomposition has one, its Fisher part aside. Up to MOST_WAYS ways are tried all; of more, groups begin with what
    pairs save together and heads are swapped while that saves more, and the given order stays if it loses less.

    Args:
        moments: the layer's, or None for a decomposition without calibration.
        distances: tokens of a calibration window.
        energy_lost: what heads lose that share a latent, of their energies, falling (`RankSearch.energy_lost`).
    """
    heads = model.config.num_key_value_heads
    energy = _key_energy(model, config, layer, moments, distances)
    size, dim = config.group_size("key", heads), head_dim(model.config)

    def lost(group: Sequence[int]) -> float:
        rows = torch.cat([torch.arange(head * dim, (head + 1) * dim) for head in group]).to(energy.device)
        return energy_lost(torch.linalg.eigvalsh(energy[rows][:, rows]).clamp_min(0).flip(0))

    known: dict[tuple[int, ...], float] = {}

    def total(groups: Groups) -> float:
        return sum(known[group] if group in known else known.setdefault(group, lost(group)) for group in groups)

    given = [tuple(range(first, first + size)) for first in range(0, heads, size)]
    ways = list(itertools.islice(_ways(tuple(range(heads)), size), MOST_WAYS + 1))
    if len(ways) > MOST_WAYS:
        ways = [_by_pairs(heads, size, lost)]
    best = min([given, *ways], key=total)
    return [head for group in best for head in group]


def in_order(model: PreTrainedModel, orders: Iterable[Sequence[int]]) -> PreTrainedModel:
    """The same model with its layers' kv heads, and their query heads, in other orders; other weights are shared."""
    state, dim = dict(model.state_dict()), head_dim(model.config)
    repeats = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, order in enumerate(orders):
        for name, width in (("q_proj", repeats * dim), ("k_proj", dim), ("v_proj", dim)):
            for kind in ("weight", "bias"):
                key = f"model.layers.{layer}.self_attn.{name}.{kind}"
                if key in state:
                    state[key] = _permuted(state[key], order, width, 0)
        key = f"model.layers.{layer}.self_attn.o_proj.weight"
        state[key] = _permuted(state[key], order, repeats * dim, 1)
    return rebuilt(model, type(model), model.config, state)


def _permuted(weight: Tensor, order: Sequence[int], width: int, dim: int) -> Tensor:
    blocks = weight.split(width, dim)
    return torch.cat([blocks[head] for head in order], dim)


def _key_energy(
    model: PreTrainedModel, config: CompressionConfig, layer: int, moments: LayerMoments | None, distances: int
) -> Tensor:
    """`M^(1/2) W C W^T M^(1/2)` of all heads' keys, float64 [kv_heads * head_dim, the same]."""
    joint = SiteShape(Site(layer, "key", 0), model.config.num_key_value_heads * head_dim(model.config))
    weight = site_weight(model, joint).double()
    energy = weight @ weight.T if moments is None else weight @ moments.gram.double() @ weight.T
    if "key" not in get_decomposition(config.decompose_method).weighed:
        return energy
    root, _, scale = roots(site_metric(model, joint, moments, distances))
    return scale * root @ energy @ root


def _ways(heads: tuple[int, ...], size: int) -> Iterable[Groups]:
    """All ways to share heads out into groups."""
    if not heads:
        yield []
        return
    for others in itertools.combinations(heads[1:], size - 1):
        left = tuple(head for head in heads[1:] if head not in others)
        for rest in _ways(left, size):
            yield [(heads[0], *others), *rest]


def _by_pairs(heads: int, size: int, lost: Callable[[Sequence[int]], float]) -> Groups:
    """Groups of heads that save most in pairs: greedy, then swaps while they save more."""
    alone = [lost((head,)) for head in range(heads)]
    saved = torch.zeros(heads, heads, dtype=torch.float64)
    for one, other in itertools.combinations(range(heads), 2):
        saved[one, other] = saved[other, one] = alone[one] + alone[other] - lost((one, other))
    groups, free = [], set(range(heads))
    while free:
        group = [max(free, key=lambda head: saved[head, list(free)].sum().item())]
        free.remove(group[0])
        while len(group) < size:
            nearest = max(free, key=lambda head: saved[head, group].sum().item())
            group.append(nearest)
            free.remove(nearest)
        groups.append(group)
    for _ in range(MOST_ROUNDS):
        if not any([_swap(saved, one, other) for one, other in itertools.combinations(groups, 2)]):
            break
    return sorted(tuple(sorted(group)) for group in groups)


def _swap(saved: Tensor, one: list[int], other: list[int]) -> bool:
    """Swap the two heads of two groups that gain most by it, if any do."""
    inside_one, inside_other = saved[:, one].sum(1), saved[:, other].sum(1)
    gains = {
        (i, j): (inside_other[a] - inside_one[a] + inside_one[b] - inside_other[b] - 2 * saved[a, b]).item()
        for i, a in enumerate(one)
        for j, b in enumerate(other)
    }
    (i, j), gain = max(gains.items(), key=lambda pair: pair[1])
    if gain <= 1e-12 * saved.abs().sum().item():
        return False
    one[i], other[j] = other[j], one[i]
    return True
