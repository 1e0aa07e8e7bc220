"""Compression end to end: token windows -> statistics -> rank plan -> factors -> a compressed model."""

import copy
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.calibrate.clip import search_clip_ratios
from palu.calibrate.fisher import fisher_information
from palu.calibrate.metrics import site_metric
from palu.calibrate.moments import LayerMoments, stream_moments
from palu.calibrate.sites import check_weights, site_shapes, site_weight
from palu.calibrate.store import StatisticsStore
from palu.calibrate.text import load_text
from palu.calibrate.windows import (
    CalibrationWindows,
    check_seqlen,
    check_vocabulary,
    sample_windows,
    tokenize,
)
from palu.config import CompressionConfig, LatentConfig
from palu.core.budget import RankBudget
from palu.core.errors import PaluError
from palu.core.linalg import relative_error
from palu.core.progress import Progress, silent
from palu.core.types import SIDES, RankPlan, Side, Site, SiteShape, SiteStats, Statistic
from palu.core.validate import require
from palu.decompose import get_decomposition
from palu.models import get_adapter
from palu.nn.fusion import fold_hadamard, fold_values, set_quantization
from palu.nn.rotary import check_rope
from palu.search import get_search

logger = logging.getLogger(__name__)


@dataclass
class Compression:
    """What `compress` returns.

    model: the compressed model; weights that did not change are shared with the original.
    plan: the rank of every site.
    shapes: every site with its full dimension.
    kept_ratio: cached numbers per token over the original's.
    calibration: the windows that were really used.
    stages: seconds and, on a GPU, peak memory in bytes of every stage.
    """

    model: PreTrainedModel
    plan: RankPlan
    shapes: list[SiteShape]
    kept_ratio: float
    calibration: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)


def statistics_needed(config: CompressionConfig) -> frozenset[Statistic]:
    """What calibration has to gather for the chosen methods.

    Raises:
        PaluError: if a method's name is unknown.
    """
    return get_search(config.search_method).needs | get_decomposition(config.decompose_method).needs


def rank_budget(config: CompressionConfig) -> RankBudget:
    """What the rank search may spend."""
    return RankBudget(config.param_ratio_target, config.rank_multiple, config.lt_hadamard)


def check_compression(model_config: Any, config: CompressionConfig, windows: CalibrationWindows | None = None) -> None:
    """Everything that can be refused before weights are loaded or text is read.

    Raises:
        PaluError: for an unsupported family or RoPE, a group size, method or window length that does not fit.
    """
    get_adapter(model_config)
    check_rope(model_config.rope_parameters["rope_type"])
    rank_budget(config).check(site_shapes(model_config, config))
    needed = statistics_needed(config)
    lengths = {"calib_seqlen": config.calib_seqlen, "fisher_seqlen": config.fisher_seqlen}
    if windows is not None:
        given = {"calib_seqlen": windows.moments, "fisher_seqlen": windows.fisher}
        lengths = {name: tokens.shape[1] for name, tokens in given.items() if tokens is not None}
        for tokens in (tokens for tokens in given.values() if tokens is not None):
            check_vocabulary(tokens, model_config, "calibration windows")
    for statistic, name in ((Statistic.MOMENTS, "calib_seqlen"), (Statistic.FISHER, "fisher_seqlen")):
        if statistic in needed and name in lengths:
            check_seqlen(lengths[name], model_config, name)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase | None, model_config: Any, config: CompressionConfig, text: str | None = None
) -> CalibrationWindows:
    """Draw the windows that the chosen methods need from `text`, or from `config.calib_dataset` if it is None.

    Raises:
        PaluError: if the text cannot be had or is too short.
    """
    needed = statistics_needed(config)
    if not needed and config.quantization.needs_search:
        # Clip ratios are searched on any calibration windows.
        needed = frozenset({Statistic.MOMENTS})
    if not needed:
        return CalibrationWindows(None, None)
    if tokenizer is None:
        raise PaluError("a tokenizer (or calibration windows) is needed by these methods")
    where = config.calib_dataset
    text = load_text(where, "calibration", config.seed) if text is None else text
    tokens = tokenize(tokenizer, text, where, model_config)
    wanted = {
        Statistic.MOMENTS: (config.n_whiten_calib_samples, config.calib_seqlen),
        Statistic.FISHER: (config.n_fisher_calib_samples, config.fisher_seqlen),
    }
    drawn = {
        statistic: sample_windows(tokens, count, seqlen, config.seed, where)
        for statistic, (count, seqlen) in wanted.items()
        if statistic in needed
    }
    return CalibrationWindows(drawn.get(Statistic.MOMENTS), drawn.get(Statistic.FISHER))


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: CompressionConfig | None = None,
    *,
    text: str | None = None,
    windows: CalibrationWindows | None = None,
    cache_dir: Path | None = None,
    progress: Progress = silent,
) -> Compression:
    """Compress a stock causal language model's key and value cache.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 model, on the device to compute on; it is not changed.
        tokenizer: for the calibration text; not needed with `windows` or with methods that need no calibration.
        config: what to do; the defaults of `CompressionConfig` if None.
        text: calibration text; `config.calib_dataset` is read if None.
        windows: calibration tokens, instead of text.
        cache_dir: where calibration statistics are kept and looked up; not at all if None.
        progress: wraps long loops to show them.

    Raises:
        PaluError: for anything in the request, the text or the weights that cannot be used.
    """
    config = config or CompressionConfig()
    check_compression(model.config, config, windows)
    stages: list[dict[str, Any]] = []
    with _stage("checks and calibration text", stages, model.device):
        check_weights(model)
        windows = windows or calibration_windows(tokenizer, model.config, config, text)
        clip_windows = windows.fisher if windows.moments is None else windows.moments
        require(
            clip_windows is not None or not config.quantization.needs_search,
            "lt_clip_ratio auto needs calibration windows",
        )
        windows = windows.only(statistics_needed(config))
    was_training = model.training
    model.eval()
    try:
        compression = _compress(model, config, windows, stages, cache_dir, progress)
    finally:
        model.train(was_training)
    if config.quantization.needs_search:
        with _stage("clip ratios", stages, model.device):
            search_clip_ratios(compression.model, clip_windows, progress)
    return compression


def _compress(
    model: PreTrainedModel,
    config: CompressionConfig,
    windows: CalibrationWindows,
    stages: list[dict[str, Any]],
    cache_dir: Path | None,
    progress: Progress,
) -> Compression:
    """Statistics, plan, factors and model, with everything checked."""
    shapes = site_shapes(model.config, config)
    logger.info("calibration windows: %s", windows.describe() or "none needed")
    with _stage("Fisher information", stages, model.device):
        scores = _site_scores(model, windows.fisher, shapes, cache_dir, progress)
    plan = get_search(config.search_method)(shapes, scores, rank_budget(config))
    with _stage("input moments and factors", stages, model.device):
        factors = dict(_stream_factors(model, windows.moments, shapes, plan, config, cache_dir, progress))
    with _stage("assembling", stages, model.device):
        compressed = _assemble(model, plan, factors, config, windows.describe())
    return Compression(compressed, plan, shapes, plan.kept_ratio(shapes), windows.describe(), stages)


@contextmanager
def _stage(name: str, stages: list[dict[str, Any]], device: torch.device) -> Iterator[None]:
    """Time a stage and take its peak GPU memory."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    yield
    row: dict[str, Any] = {"stage": name}
    if on_gpu:
        torch.cuda.synchronize(device)
        row["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    stages.append(row | {"seconds": time.perf_counter() - started})


def _site_scores(
    model: PreTrainedModel, windows: Tensor | None, shapes: list[SiteShape], cache_dir: Path | None, progress: Progress
) -> dict[Site, float]:
    """Fisher information of every site, empty where no window was drawn for it."""
    if windows is None:
        return {}
    store = StatisticsStore(cache_dir, "fisher", model, windows) if cache_dir else None
    if store and store.holds("scores"):
        by_head = store.read("scores")
    else:
        by_head = fisher_information(model, windows, progress)
        if store:
            store.write("scores", by_head)
    heads_per_group = {
        side: model.config.num_key_value_heads // sum(s.site.layer == 0 and s.site.side == side for s in shapes)
        for side in SIDES
    }
    scores = {}
    for site in (shape.site for shape in shapes):
        size = heads_per_group[site.side]
        heads = by_head[site.side][site.layer, site.group * size : (site.group + 1) * size]
        scores[site] = heads.mean().item()
    return scores


def _stream_factors(
    model: PreTrainedModel,
    windows: Tensor | None,
    shapes: list[SiteShape],
    plan: RankPlan,
    config: CompressionConfig,
    cache_dir: Path | None,
    progress: Progress,
) -> Iterator[tuple[tuple[int, Side], tuple[Tensor, Tensor]]]:
    """(down, up) of every projection, its groups side by side, as each layer's statistics come in."""
    decompose = get_decomposition(config.decompose_method)
    num_layers = model.config.num_hidden_layers
    moments: Iterable[LayerMoments | None] = [None] * num_layers
    if windows is not None:
        moments = stream_moments(model, windows, progress)
        if cache_dir:
            store = StatisticsStore(cache_dir, "moments", model, windows)
            kept = store.stream((each._asdict() for each in moments), num_layers, model.device)
            moments = (LayerMoments(**each) for each in kept)
    for layer, of_layer in enumerate(moments):
        gram = None if of_layer is None else of_layer.gram
        for side in SIDES:
            groups = [shape for shape in shapes if shape.site.layer == layer and shape.site.side == side]
            parts = []
            for shape in groups:
                weight = site_weight(model, shape)
                metric = site_metric(model, shape, of_layer, windows.shape[1]) if side in decompose.weighed else None
                parts.append(decompose(weight, SiteStats(gram, metric)).truncate(plan.ranks[shape.site]))
                if logger.isEnabledFor(logging.DEBUG):
                    lost = relative_error(weight, parts[-1], gram, metric)
                    logger.debug("%s: rank %d loses %.2e of the output energy", shape.site, len(parts[-1].down), lost)
            down, up = torch.cat([part.down for part in parts]), torch.cat([part.up for part in parts], dim=1)
            yield (layer, side), (down.to(model.dtype), up.to(model.dtype))


def _assemble(
    model: PreTrainedModel,
    plan: RankPlan,
    factors: dict[tuple[int, Side], tuple[Tensor, Tensor]],
    config: CompressionConfig,
    calibration: dict[str, Any],
) -> PreTrainedModel:
    """The compressed model around the original's other weights."""
    adapter = get_adapter(model.config)
    record = config.to_dict() | {"calibration": calibration, "source_model": model.config._name_or_path}
    latent = LatentConfig.from_plan(plan, model.config.num_hidden_layers, record)
    latent_config = adapter.latent_config(model.config, latent)
    latent_config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        compressed = adapter.causal_lm_class(latent_config)
    state = dict(model.state_dict())
    for (layer, side), (down, up) in factors.items():
        prefix = f"model.layers.{layer}.self_attn.{'k' if side == 'key' else 'v'}_proj"
        del state[f"{prefix}.weight"]
        state[f"{prefix}.down.weight"], state[f"{prefix}.up"] = down, up
    compressed.load_state_dict(state, strict=True, assign=True)
    compressed.tie_weights()
    _copy_rotary(compressed, model)
    if config.lt_hadamard:
        fold_hadamard(compressed)
    if config.fuse_values:
        fold_values(compressed)
    set_quantization(compressed, config.quantization)
    compressed.generation_config = copy.deepcopy(model.generation_config)
    return compressed.eval()


def _copy_rotary(compressed: nn.Module, model: nn.Module) -> None:
    """RoPE's frequencies are not part of the state dict; a copy, so that casting one model leaves the other alone."""
    compressed.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
