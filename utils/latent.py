"""Flags of the scripts that say how a compressed model's cache stores its latents."""

import argparse
import dataclasses
from typing import Any

from utils.sparsity import add_sparsity_flags, asked_sparsity

# Fewer calibration tokens than this determine no clip ratio.
LEAST_TOKENS = 256


def add_latent_flags(parser: argparse.ArgumentParser, evaluates: bool = True) -> None:
    """How the cache stores latents; `evaluates`: for a script that loads a compressed checkpoint, whose cache may drop
    tokens as well.
    """
    flag = parser.add_argument_group(
        "latents in the cache" + (" (what is not given is as the checkpoint says)" if evaluates else "")
    ).add_argument
    flag("--lt_bits", type=int, help="bits per latent: 2, 3, 4, 8, or 16 for no quantisation (default: 16)")
    flag("--lt_value_bits", type=int, help="the same for values only (default: as --lt_bits)")
    flag("--lt_group_size", type=int, help="latents that share a scale (default: a whole head group)")
    flag("--lt_sym", action=argparse.BooleanOptionalAction, default=None, help="symmetric codes, without zero points")
    flag(
        "--lt_clip_ratio",
        type=clip_ratio,
        help="fraction of a group's range that the codes span, or auto: least squared error on the calibration text "
        "(default: 1)",
    )
    flag("--lt_sinks", type=int, help="first tokens that are not quantised (default: 0)")
    flag("--lt_window", type=int, help="newest tokens that are not quantised yet (default: 0)")
    flag(
        "--lt_hadamard",
        action="store_true",
        help="turn each group's latents by a Hadamard matrix: the same model, kinder to quantisation",
    )
    if evaluates:
        flag("--lt_calib_dataset", help="text for --lt_clip_ratio auto (default: what the checkpoint was made with)")
        add_sparsity_flags(parser)


def clip_ratio(text: str) -> float | str:
    """Argparse type of a clip ratio: a number, or `auto`."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'") from None


def check_latent_flags(config: Any, tokenizer: Any, path: str, args: argparse.Namespace) -> Any:
    """Refuse latent flags for a model that has no latents, and values that are not allowed, before any long work.

    Returns:
        The token windows that clip ratios will be searched on, None if none will.

    Raises:
        PaluError: naming the flag.
    """
    from palu.core.errors import PaluError
    from palu.models import is_latent

    flags = {name: value for name, value in vars(args).items() if name.startswith("lt_")}
    given = [name for name, value in flags.items() if value is not None and value is not False]
    if not is_latent(config):
        if given:
            raise PaluError(f"{path} is not a compressed model; --{given[0]} needs one")
        if asked_sparsity(config, args) is not None:
            raise PaluError(f"{path} is not a compressed model; --token_sparse_method needs one")
        return None
    settings = _asked(config.latent, args)
    # Refuses exact tokens together with a policy that drops tokens.
    dataclasses.replace(config.latent, quantization=settings, sparsity=asked_sparsity(config, args))
    if args.lt_hadamard:
        _check_hadamard(config.latent, path)
    if settings.needs_search:
        return _clip_windows(config, tokenizer, args)
    if args.lt_calib_dataset is not None:
        raise PaluError("--lt_calib_dataset is for --lt_clip_ratio auto with quantised latents")
    return None


def apply_latent_flags(model: Any, windows: Any, args: argparse.Namespace) -> None:
    """Set how the cache of a loaded model stores latents, and of which tokens, as the flags say.

    A stock model is left alone.

    Args:
        windows: what `check_latent_flags` returned.
    """
    from palu import fold_hadamard, search_clip_ratios, set_cache
    from palu.models import is_latent
    from utils.console import progress

    if not is_latent(model):
        return
    settings = _asked(model.config.latent, args)
    if args.lt_hadamard:
        fold_hadamard(model)
    set_cache(model, settings, asked_sparsity(model.config, args))
    if settings.needs_search:
        search_clip_ratios(model, windows, progress)


def _asked(latent: Any, args: argparse.Namespace) -> Any:
    """The checkpoint's settings with the flags; clip ratios are to be searched again where they no longer hold."""
    settings = latent.quantization.changed_by_flags(vars(args))
    turned = args.lt_hadamard and not latent.hadamard
    if turned or args.lt_calib_dataset is not None:
        settings = dataclasses.replace(settings, clip_ratios=None)
    return settings


def _check_hadamard(latent: Any, path: str) -> None:
    from palu.core.errors import PaluError
    from palu.core.hadamard import is_reachable, nearest_reachable

    ranks = {rank for layer in latent.layers for rank in (*layer.key, *layer.value)}
    odd = sorted(rank for rank in ranks if not is_reachable(rank))
    if odd and not latent.hadamard:
        raise PaluError(
            f"--lt_hadamard: {path} has a group of rank {odd[0]}, of which no Hadamard matrix can be constructed (the "
            f"nearest valid rank is {nearest_reachable(odd[0])}); compress with --lt_hadamard, which avoids such ranks"
        )


def _clip_windows(config: Any, tokenizer: Any, args: argparse.Namespace) -> Any:
    """Token windows of the calibration text, int64 [windows, seqlen]."""
    from palu.calibrate.text import load_text
    from palu.calibrate.windows import sample_windows, tokenize
    from palu.core.errors import PaluError

    dataset = args.lt_calib_dataset or config.latent.compression.get("calib_dataset")
    if dataset is None:
        raise PaluError("--lt_clip_ratio auto needs --lt_calib_dataset: the checkpoint names no calibration text")
    tokens = tokenize(tokenizer, load_text(dataset, "calibration", args.seed), dataset, config)
    if len(tokens) < LEAST_TOKENS:
        raise PaluError(f"{dataset}: {len(tokens)} tokens are too few to search clip ratios on; give {LEAST_TOKENS}")
    seqlen = min(2048, config.max_position_embeddings, len(tokens))
    return sample_windows(tokens, len(tokens) // seqlen, seqlen, args.seed, dataset)
