"""Flags of the scripts that say how a compressed model's cache stores its latents."""

import argparse
import dataclasses
from typing import Any


def add_latent_flags(parser: argparse.ArgumentParser, evaluates: bool = True) -> None:
    """How the cache stores latents; `evaluates`: for a script that loads a compressed checkpoint."""
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
    flag("--lt_window", type=int, help="newest tokens that are not quantised (default: 0)")
    flag(
        "--lt_hadamard",
        action="store_true",
        help="turn each group's latents by a Hadamard matrix: the same model, kinder to quantisation",
    )
    if evaluates:
        flag("--lt_calib_dataset", help="text for --lt_clip_ratio auto (default: what the checkpoint was made with)")


def clip_ratio(text: str) -> float | str:
    """Argparse type of a clip ratio: a number, or `auto`."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'") from None


def latent_settings(args: argparse.Namespace, quantization: Any) -> Any:
    """A `QuantizationConfig` with the flags that were given.

    Raises:
        PaluError: for a value that is not allowed.
    """
    given = {
        "key_bits": args.lt_bits,
        "value_bits": args.lt_bits if args.lt_value_bits is None else args.lt_value_bits,
        "group_size": args.lt_group_size,
        "symmetric": args.lt_sym,
        "clip_ratio": args.lt_clip_ratio,
        "sinks": args.lt_sinks,
        "window": args.lt_window,
    }
    return quantization.changed(**{name: value for name, value in given.items() if value is not None})


def check_latent_flags(config: Any, path: str, args: argparse.Namespace) -> str | None:
    """Refuse latent flags for a model that has no latents, and values that are not allowed, before any long work.

    Returns:
        The text that clip ratios will be searched on, None if none will.

    Raises:
        PaluError: naming the flag.
    """
    from palu.calibrate.text import load_text
    from palu.core.errors import PaluError
    from palu.models import is_latent

    flags = {name: value for name, value in vars(args).items() if name.startswith("lt_")}
    given = [name for name, value in flags.items() if value is not None and value is not False]
    if not is_latent(config):
        if given:
            raise PaluError(f"{path} is not a compressed model; --{given[0]} needs one")
        return None
    latent = config.latent
    settings = latent_settings(args, latent.quantization)
    turned = args.lt_hadamard and not latent.hadamard
    if turned:
        settings = dataclasses.replace(settings, clip_ratios=None)
    if not settings.needs_search:
        if args.lt_calib_dataset is not None:
            raise PaluError(
                "--lt_calib_dataset is for --lt_clip_ratio auto with quantised latents; nothing is searched"
            )
        return None
    dataset = args.lt_calib_dataset or latent.compression.get("calib_dataset")
    if dataset is None:
        raise PaluError("--lt_clip_ratio auto needs --lt_calib_dataset: the checkpoint names no calibration text")
    return load_text(dataset, "calibration", args.seed)


def apply_latent_flags(model: Any, tokenizer: Any, text: str | None, args: argparse.Namespace) -> None:
    """Set how the cache of a loaded model stores latents, as the flags say; a stock model is left alone.

    Args:
        text: what `check_latent_flags` returned.
    """
    from palu import fold_hadamard, search_clip_ratios, set_quantization
    from palu.calibrate.windows import sample_windows, tokenize
    from palu.models import is_latent
    from utils.console import progress

    if not is_latent(model):
        return
    settings = latent_settings(args, model.config.latent.quantization)
    if args.lt_hadamard and not model.config.latent.hadamard:
        fold_hadamard(model)
        settings = dataclasses.replace(settings, clip_ratios=None)
    set_quantization(model, settings)
    if settings.needs_search:
        where = "--lt_clip_ratio auto"
        tokens = tokenize(tokenizer, text, where, model.config)
        seqlen = min(2048, model.config.max_position_embeddings, len(tokens))
        search_clip_ratios(model, sample_windows(tokens, len(tokens) // seqlen, seqlen, args.seed, where), progress)
