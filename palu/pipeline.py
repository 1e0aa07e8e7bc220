"""Compression end to end: token windows -> statistics -> rank plan -> factors -> a compressed model."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.calibrate.adapt import Adaptation, adapt_outputs
from palu.calibrate.clip import search_clip_ratios
from palu.calibrate.damage import Damage
from palu.calibrate.evidence import Calibration
from palu.calibrate.refit import refit_outputs
from palu.calibrate.regroup import in_order
from palu.calibrate.sites import check_weights, site_shapes
from palu.calibrate.text import load_text
from palu.calibrate.windows import (
    CalibrationWindows,
    check_seqlen,
    check_vocabulary,
    kinds_of_windows,
    sample_windows,
    tokenize,
)
from palu.config import CompressionConfig, LatentConfig
from palu.core.budget import RankBudget
from palu.core.errors import PaluError
from palu.core.progress import Progress, silent
from palu.core.types import Evidence, Factors, Projection, RankPlan, Site, SiteShape, Statistic, by_projection
from palu.core.validate import require
from palu.decompose import get_decomposition
from palu.models import get_adapter
from palu.models.rebuilt import rebuilt
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
    adaptation: what the step towards the calibration text did, if one was asked for.
    """

    model: PreTrainedModel
    plan: RankPlan
    shapes: list[SiteShape]
    kept_ratio: float
    calibration: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    adaptation: Adaptation | None = None


def statistics_needed(config: CompressionConfig) -> frozenset[Statistic]:
    """What calibration has to gather for the chosen methods.

    Raises:
        PaluError: if a method's name is unknown.
    """
    needed = get_search(config.search_method).needs | get_decomposition(config.decompose_method).needs
    return needed | {Statistic.MOMENTS} if config.on_moments else needed


def rank_budget(config: CompressionConfig) -> RankBudget:
    """What the rank search may spend."""
    return RankBudget(
        kept_ratio=config.param_ratio_target,
        rank_multiple=config.rank_multiple,
        hadamard=config.lt_hadamard,
        key_cost=config.key_cost,
        codes=config.quantization,
        max_key_rank=config.max_key_rank,
    )


def check_compression(model_config: Any, config: CompressionConfig, windows: CalibrationWindows | None = None) -> None:
    """Everything that can be refused before weights are loaded or text is read.

    Raises:
        PaluError: for an unsupported family or RoPE, a group size, method or window length that does not fit.
    """
    get_adapter(model_config)
    check_rope(model_config.rope_parameters["rope_type"])
    get_search(config.search_method).check(site_shapes(model_config, config), rank_budget(config))
    config.quantization.check_layers(model_config.num_hidden_layers)
    heads = model_config.num_key_value_heads
    if config.regroup and config.group_size("key", heads) in (1, heads):
        raise PaluError(
            f"regroup does nothing in groups of one or of all {heads} kv heads; use another head_group_size"
        )
    needed = kinds_of_windows(statistics_needed(config))
    lengths = {"calib_seqlen": config.calib_seqlen, "fisher_seqlen": config.fisher_seqlen}
    if windows is not None:
        given = {"calib_seqlen": windows.moments, "fisher_seqlen": windows.fisher}
        lengths = {name: tokens.shape[1] for name, tokens in given.items() if tokens is not None}
        for tokens in (tokens for tokens in given.values() if tokens is not None):
            check_vocabulary(tokens, model_config, "calibration windows")
    for kind, name in (("moments", "calib_seqlen"), ("fisher", "fisher_seqlen")):
        if kind in needed and name in lengths:
            check_seqlen(lengths[name], model_config, name)


def check_moments(config: CompressionConfig, windows: CalibrationWindows) -> None:
    """Refuse a single window for what cannot do with one.

    Raises:
        PaluError: saying what to do.
    """
    for name in config.on_moments:
        require(
            len(windows.moments) > 1,
            f"{name} needs two or more calibration windows, the text holds one; give a longer one, a smaller "
            f"calib_seqlen, or turn {name} off",
        )


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase | None, model_config: Any, config: CompressionConfig, text: str | None = None
) -> CalibrationWindows:
    """Draw the windows that the chosen methods need from `text`, or from `config.calib_dataset` if it is None.

    Raises:
        PaluError: if the text cannot be had or is too short.
    """
    needed = kinds_of_windows(statistics_needed(config))
    if not needed and config.searches_clip_ratios:
        # Clip ratios are searched on any calibration windows.
        needed = {"moments"}
    if not needed:
        return CalibrationWindows(None, None)
    if tokenizer is None:
        raise PaluError("a tokenizer (or calibration windows) is needed by these methods")
    where = config.calib_dataset
    text = load_text(where, "calibration", config.seed) if text is None else text
    tokens = tokenize(tokenizer, text, where, model_config)
    wanted = {
        "moments": (config.n_whiten_calib_samples, config.calib_seqlen),
        "fisher": (config.n_fisher_calib_samples, config.fisher_seqlen),
    }
    drawn = {
        kind: sample_windows(tokens, count, seqlen, config.seed, where)
        for kind, (count, seqlen) in wanted.items()
        if kind in needed
    }
    return CalibrationWindows(drawn.get("moments"), drawn.get("fisher"))


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
            clip_windows is not None or not config.searches_clip_ratios,
            "lt_clip_ratio auto needs calibration windows",
        )
        windows = windows.only(statistics_needed(config))
        check_moments(config, windows)
    was_training = model.training
    model.eval()
    try:
        compression = _compress(model, config, windows, stages, cache_dir, progress)
    finally:
        model.train(was_training)
    if config.searches_clip_ratios:
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
    calibration = Calibration(model, config, windows, cache_dir, progress)
    search, shapes = get_search(config.search_method), calibration.shapes
    if config.regroup:
        with _stage("grouping heads", stages, model.device):
            lost = partial(
                search.energy_lost,
                group=next(shape for shape in shapes if shape.site.side == "key"),
                budget=rank_budget(config),
            )
            model = in_order(model, calibration.head_orders(lost))
        calibration = dataclasses.replace(calibration, model=model)
    logger.info("calibration windows: %s", windows.describe() or "none needed")
    scores: dict[Site, float] = {}
    if Statistic.FISHER in search.needs:
        with _stage("Fisher information", stages, model.device):
            scores = calibration.weight_fisher()
    output_fisher: dict[Projection, Tensor] = {}
    if Statistic.OUTPUT_FISHER in get_decomposition(config.decompose_method).needs:
        with _stage("Fisher information of outputs", stages, model.device):
            output_fisher = calibration.output_fisher()
    with _stage("input moments and factors", stages, model.device):
        factors = calibration.factors(output_fisher)
    damage: Damage = {}
    if Statistic.DAMAGE in search.needs:
        with _stage("damage of every projection", stages, model.device):
            damage = calibration.damage(factors)
    energy = {site: each.energy for site, each in factors.items()}
    plan = search(shapes, Evidence(scores, energy, damage), rank_budget(config))
    for site, rank in plan.ranks.items():
        lost = energy[site][rank:].sum() / energy[site].sum().clamp_min(1e-300)
        logger.debug("%s: rank %d loses %.2e of the energy", site, rank, lost)
    with _stage("assembling", stages, model.device):
        compressed = _assemble(model, plan, _side_by_side(factors, plan), config, windows.describe())
    if config.sequential:
        with _stage("refitting o_proj", stages, model.device):
            refit_outputs(compressed, model, windows.moments, progress)
    adaptation = None
    if config.adapt:
        with _stage("adapting o_proj", stages, model.device):
            adaptation = adapt_outputs(compressed, model, windows.moments, config.adapt, progress)
        if adaptation.step == 0:
            logger.warning("adapt %g moved nothing: no step lowers the text's loss within that share", config.adapt)
    with _stage("assembling", stages, model.device):
        _fold(compressed, config, plan)
    return Compression(compressed, plan, shapes, plan.kept_ratio(shapes), windows.describe(), stages, adaptation)


@contextmanager
def _stage(name: str, stages: list[dict[str, Any]], device: torch.device) -> Iterator[None]:
    """Time a stage and take its peak GPU memory; a stage that goes on later stays one row."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    yield
    row = next((row for row in stages if row["stage"] == name), None)
    if row is None:
        row = {"stage": name, "seconds": 0.0}
        stages.append(row)
    if on_gpu:
        torch.cuda.synchronize(device)
        row["peak_gpu_bytes"] = max(row.get("peak_gpu_bytes", 0), torch.cuda.max_memory_allocated(device))
    row["seconds"] += time.perf_counter() - started


def _side_by_side(factors: dict[Site, Factors], plan: RankPlan) -> dict[Projection, tuple[Tensor, Tensor]]:
    """(down, up) of every projection at the plan's ranks, its groups side by side."""
    projections = {}
    for key, sites in by_projection(factors).items():
        # One projection's full factors after the other are let go of.
        parts = [factors.pop(site).truncate(plan.ranks[site]) for site in sites]
        projections[key] = torch.cat([part.down for part in parts]), torch.cat([part.up for part in parts], dim=1)
    return projections


def _assemble(
    model: PreTrainedModel,
    plan: RankPlan,
    factors: dict[Projection, tuple[Tensor, Tensor]],
    config: CompressionConfig,
    calibration: dict[str, Any],
) -> PreTrainedModel:
    """The compressed model around the original's other weights."""
    adapter = get_adapter(model.config)
    record = config.to_dict() | {"calibration": calibration, "source_model": model.config._name_or_path}
    latent = LatentConfig.from_plan(plan, model.config.num_hidden_layers, record)
    latent_config = adapter.latent_config(model.config, latent)
    latent_config._attn_implementation = model.config._attn_implementation
    state = dict(model.state_dict())
    for (layer, side), (down, up) in factors.items():
        prefix = f"model.layers.{layer}.self_attn.{'k' if side == 'key' else 'v'}_proj"
        del state[f"{prefix}.weight"]
        state[f"{prefix}.down.weight"], state[f"{prefix}.up"] = down, up
    return rebuilt(model, adapter.causal_lm_class, latent_config, state)


def _fold(compressed: PreTrainedModel, config: CompressionConfig, plan: RankPlan) -> None:
    """What changes weights but not what the model computes, and how its caches store latents."""
    if config.lt_hadamard:
        fold_hadamard(compressed)
    if config.fuse_values:
        fold_values(compressed)
    planned = {} if plan.bits is None else {"layer_bits": plan.layer_bits()}
    set_quantization(compressed, dataclasses.replace(config.quantization, **planned))
