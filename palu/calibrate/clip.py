"""Clip ratios of the quantiser, searched on calibration text."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palu.core.errors import PaluError
from palu.core.progress import Progress, silent
from palu.core.types import SIDES
from palu.kernels.quantize import Quantization, quantize
from palu.nn.fusion import set_quantization

CANDIDATES = tuple(1 - 0.05 * step for step in range(11))
# Latents of a few thousand tokens determine one number per group well.
MOST_TOKENS = 16384


@torch.no_grad()
def search_clip_ratios(model: PreTrainedModel, windows: Tensor, progress: Progress = silent) -> None:
    """Choose each quantisation group's clip ratio by the mean squared error of its latents, and note it in the config.

    Does nothing unless the model's quantisation asks for `auto` ratios that are not known yet.

    Args:
        model: a compressed model.
        windows: token ids, int64 [windows, seqlen]; the first ones, about 16k tokens, are used.

    Raises:
        PaluError: if a latent is not finite, naming the layer.
    """
    settings = model.config.latent.quantization
    if not settings.needs_search:
        return
    plain = dataclasses.replace(settings, clip_ratio=1.0)
    searches = {side: [] for side in SIDES}
    for index, (layer, ranks) in enumerate(zip(model.model.layers, model.config.latent.layers, strict=True)):
        for side, projection in (("key", layer.self_attn.k_proj), ("value", layer.self_attn.v_proj)):
            quantization = plain.of(getattr(ranks, side), side, index)
            searches[side].append(_Search(f"layer {index}, {side}", projection.down, quantization))
    windows = windows[: max(1, MOST_TOKENS // windows.shape[1])]
    with _listening([search for side in SIDES for search in searches[side]]):
        for window in progress(windows, "clip ratios", len(windows)):
            model.model(input_ids=window[None].to(model.device), use_cache=False)
    found = {side: [search.best() for search in searches[side]] for side in SIDES}
    set_quantization(model, dataclasses.replace(settings, clip_ratios=found))


class _Search:
    """Squared errors of one projection's latents for every candidate, summed per group over the tokens."""

    def __init__(self, name: str, down: nn.Module, quantization: Quantization | None) -> None:
        self.name, self.down = name, down
        self.candidates: list[Quantization] = []
        if quantization is not None:
            groups = len(quantization.widths)
            self.candidates = [dataclasses.replace(quantization, clip_ratios=(ratio,) * groups) for ratio in CANDIDATES]
        self.errors: Tensor | None = None

    def hear(self, module: nn.Module, args: tuple[Tensor, ...], latents: Tensor) -> None:
        """Forward hook of the down projection."""
        errors = torch.stack([_squared_errors(latents, candidate) for candidate in self.candidates])
        self.errors = errors if self.errors is None else self.errors + errors

    def best(self) -> list[float]:
        """The ratio of least error for every group; none where this side is not quantised."""
        if not self.candidates:
            return []
        if not torch.isfinite(self.errors).all():
            raise PaluError(f"NaN or infinity in the latents of {self.name}")
        return [CANDIDATES[index] for index in self.errors.argmin(dim=0).tolist()]


def _squared_errors(latents: Tensor, quantization: Quantization) -> Tensor:
    """Float64 [groups], summed over tokens."""
    restored = quantize(latents, quantization).dequantized(torch.float32)
    groups = (restored - latents.float()).square().split(list(quantization.widths), dim=-1)
    return torch.stack([group.double().sum() for group in groups])


@contextmanager
def _listening(searches: Sequence[_Search]) -> Iterator[None]:
    handles = [search.down.register_forward_hook(search.hear) for search in searches if search.candidates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
