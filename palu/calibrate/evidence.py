"""What the rank plan and the factors are made of: gathered on calibration windows, or read from the cache."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palu.calibrate.damage import FRACTIONS, Damage, probe_damage
from palu.calibrate.fisher import fisher_information, output_fisher
from palu.calibrate.metrics import blend, site_metric
from palu.calibrate.moments import LayerMoments, stream_moments
from palu.calibrate.regroup import head_order
from palu.calibrate.sites import site_shapes, site_weight
from palu.calibrate.store import StatisticsStore, content_hash
from palu.calibrate.windows import CalibrationWindows
from palu.config import CompressionConfig
from palu.core.progress import Progress
from palu.core.types import SIDES, Factors, Projection, Side, Site, SiteShape, SiteStats, Statistic, by_projection
from palu.decompose import get_decomposition


@dataclass(frozen=True)
class Calibration:
    """A model, what is asked of it and the windows; its methods gather one kind of evidence each.

    cache_dir: where statistics are kept and looked up; not at all if None.
    progress: wraps long loops to show them.
    """

    model: PreTrainedModel
    config: CompressionConfig
    windows: CalibrationWindows
    cache_dir: Path | None
    progress: Progress

    @property
    def shapes(self) -> list[SiteShape]:
        """Every site."""
        return site_shapes(self.model.config, self.config)

    @property
    def groups(self) -> dict[Side, int]:
        """Head groups of each side."""
        heads = self.model.config.num_key_value_heads
        return {side: heads // self.config.group_size(side, heads) for side in SIDES}

    def weight_fisher(self) -> dict[Site, float]:
        """Fisher information of every site's weights, the mean of its heads'."""
        windows = self.windows.fisher
        by_head = self._kept("fisher", windows, lambda: fisher_information(self.model, windows, self.progress))
        scores = {}
        for shape in self.shapes:
            site, groups = shape.site, self.groups[shape.site.side]
            scores[site] = by_head[site.side][site.layer].view(groups, -1)[site.group].mean().item()
        return scores

    def output_fisher(self) -> dict[Projection, Tensor]:
        """`palu.calibrate.fisher.output_fisher` of the Fisher windows."""
        windows, seed, groups = self.windows.fisher, self.config.seed, self.groups
        kind = f"output_fisher-{groups['key']}-{groups['value']}-{seed}"

        def gather() -> dict[str, Tensor]:
            return _named(output_fisher(self.model, windows, groups, seed, self.progress))

        found = self._kept(kind, windows, gather)
        return {key: tensor.to(self.model.device) for key, tensor in _by_projection(found).items()}

    def factors(self, fisher: Mapping[Projection, Tensor]) -> dict[Site, Factors]:
        """Factors of full rank of every site, in the model's dtype, as each layer's statistics come in.

        fisher: what `output_fisher` gave; empty where the decomposition does not need it.
        """
        decompose = get_decomposition(self.config.decompose_method)
        factors = {}
        shapes = {shape.site: shape for shape in self.shapes}
        projections = by_projection(shapes)
        for layer, moments in enumerate(self._moments()):
            for key in ((layer, side) for side in SIDES):
                own = [shapes[site] for site in projections[key]]
                metrics: Sequence[Tensor | None] = [None] * len(own)
                if key[1] in decompose.weighed:
                    distances = self.windows.moments.shape[1]
                    metrics = [site_metric(self.model, shape, moments, distances) for shape in own]
                    if fisher:
                        metrics = blend(torch.stack(metrics), fisher[key])
                for shape, metric in zip(own, metrics, strict=True):
                    stats = SiteStats(None if moments is None else moments.gram, metric)
                    down, up, energy = decompose(site_weight(self.model, shape), stats)
                    factors[shape.site] = Factors(down.to(self.model.dtype), up.to(self.model.dtype), energy.cpu())
        return factors

    def damage(self, factors: Mapping[Site, Factors]) -> Damage:
        """`probe_damage` of these factors on the first of the moments' windows."""
        probes = self.windows.moments[: self.config.n_probe_calib_samples]
        # Energies tell factors apart, whatever made them.
        energies = {f"{site}": each.energy.float() for site, each in sorted(factors.items())}
        kind = f"damage-{content_hash(energies | {'fractions': torch.tensor(FRACTIONS)})[:24]}"

        def measure() -> dict[str, Tensor]:
            found = probe_damage(self.model, factors, probes, self.progress)
            return _named({key: torch.tensor(points, dtype=torch.float64) for key, points in found.items()})

        kept = self._kept(kind, probes, measure)
        return {key: [(energy, nats) for energy, nats in each.tolist()] for key, each in _by_projection(kept).items()}

    def head_orders(self, energy_lost: Callable[[Tensor], float]) -> Iterator[list[int]]:
        """`palu.calibrate.regroup.head_order` of every layer."""
        windows = self.windows.moments
        for layer, moments in enumerate(self._moments()):
            distances = 0 if windows is None else windows.shape[1]
            yield head_order(self.model, self.config, layer, moments, distances, energy_lost)

    def _moments(self) -> Iterable[LayerMoments | None]:
        """Every layer's moments, one at a time; None where there are no windows for them."""
        model, windows = self.model, self.windows.moments
        layers = model.config.num_hidden_layers
        if windows is None or Statistic.MOMENTS not in get_decomposition(self.config.decompose_method).needs:
            return [None] * layers
        moments = stream_moments(model, windows, self.progress)
        if self.cache_dir is None:
            return moments
        store = StatisticsStore(self.cache_dir, "moments", model, windows)
        kept = store.stream((each._asdict() for each in moments), layers, model.device)
        return (LayerMoments(**each) for each in kept)

    def _kept(self, kind: str, windows: Tensor, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute` gives, from the cache if it is there."""
        if self.cache_dir is None:
            return compute()
        store = StatisticsStore(self.cache_dir, kind, self.model, windows)
        name = "scores"
        if not store.holds(name):
            store.write(name, compute())
        return store.read(name)


def _named(tensors: Mapping[Projection, Tensor]) -> dict[str, Tensor]:
    """As files name them."""
    return {f"{layer}-{side}": tensor for (layer, side), tensor in tensors.items()}


def _by_projection(named: Mapping[str, Tensor]) -> dict[Projection, Tensor]:
    """`_named` undone."""
    parts = ((*name.split("-"), tensor) for name, tensor in named.items())
    return {(int(layer), side): tensor for layer, side, tensor in parts}
