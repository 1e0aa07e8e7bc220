"""Flags of the scripts that say which tokens a compressed model's cache keeps."""

import argparse
from typing import Any

# Names of the flags and of the settings that they give.
SETTINGS = {
    "prompt_capacity": "capacity",
    "prompt_capacity_rate": "capacity_rate",
    "window_size": "window_size",
    "kernel_size": "kernel_size",
    "sink_tokens": "sink_tokens",
    "pool_type": "pool_type",
    "pyramid_beta": "pyramid_beta",
    "skip_prefill_compression": "skip_prefill_compression",
}
METHODS = ("snapkv", "pyramidkv", "streaming", "pool")


def add_sparsity_flags(parser: argparse.ArgumentParser) -> None:
    """Which tokens the cache keeps."""
    flag = parser.add_argument_group("tokens in the cache (default: as the checkpoint says, which is all)").add_argument
    flag(
        "--token_sparse_method",
        choices=(*METHODS, "none"),
        help="snapkv: those that the newest queries attend to, chosen after the prompt; pyramidkv: the same with fewer "
        "tokens in later layers; streaming: the first and the newest; pool: the first and the newest, those between "
        "merged; streaming and pool while decoding too; none: all",
    )
    flag("--prompt_capacity", type=int, help="tokens that a layer keeps")
    flag("--prompt_capacity_rate", type=float, help="the same as a fraction of the tokens seen, in (0, 1]")
    flag("--window_size", type=int, help="newest tokens that stay exact and whose queries vote (default: 32)")
    flag("--kernel_size", type=int, help="neighbours over which snapkv and pyramidkv average votes (default: 5)")
    flag(
        "--sink_tokens",
        type=int,
        help="first tokens that stay exact (default: 4 for streaming and pool, 0 for snapkv and pyramidkv)",
    )
    flag("--pool_type", choices=("mean", "max", "best"), help="what pool makes of a window of tokens (default: mean)")
    flag(
        "--pyramid_beta",
        type=float,
        help="steepness of the budgets over the layers (default: 20 for pyramidkv, 1 for pool: all layers alike)",
    )
    flag(
        "--skip_prefill_compression",
        action="store_true",
        default=None,
        help="streaming and pool: drop nothing before decoding",
    )


def asked_sparsity(saved: Any, args: argparse.Namespace) -> Any:
    """The `TokenSparsity` that the flags ask for; `saved`, the checkpoint's, where they ask for none.

    Raises:
        PaluError: for a value that is not allowed, or a flag that would do nothing.
    """
    from palu.core.errors import PaluError
    from palu.token_sparsity import TokenSparsity

    given = {setting: getattr(args, flag) for flag, setting in SETTINGS.items() if getattr(args, flag) is not None}
    if args.token_sparse_method not in (None, "none"):
        return TokenSparsity(args.token_sparse_method, **given)
    useless = [flag for flag in SETTINGS if getattr(args, flag) is not None]
    if useless:
        raise PaluError(f"--{useless[0]} does nothing without --token_sparse_method {', '.join(METHODS)}")
    return saved if args.token_sparse_method is None else None


def sparsity_row(config: Any) -> dict[str, Any]:
    """What a model's cache keeps, as entries of a row; nothing where it keeps all tokens."""
    from palu.models import is_latent

    sparsity = config.latent.sparsity if is_latent(config) else None
    if sparsity is None:
        return {}
    names = {setting: flag for flag, setting in SETTINGS.items()} | {"method": "token_sparse_method"}
    return {names[name]: value for name, value in sparsity.to_dict().items()}


def sparsity_label(row: dict[str, Any]) -> str:
    """The token policy of a row, in a few words."""
    if "token_sparse_method" not in row:
        return ""
    rate, capacity = row.get("prompt_capacity_rate"), row.get("prompt_capacity")
    return f"{row['token_sparse_method']} {capacity if rate is None else f'{rate:g}'}"
