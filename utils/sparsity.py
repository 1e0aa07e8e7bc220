"""Flags of the scripts that say which tokens a compressed model's cache keeps."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


def add_sparsity_flags(parser: argparse.ArgumentParser) -> None:
    """Which tokens the cache keeps."""
    flag = parser.add_argument_group("tokens in the cache (default: as the checkpoint says, which is all)").add_argument
    flag(
        "--token_sparse_method",
        metavar="METHOD",
        help="snapkv: those that the newest queries attend to, chosen after the prompt; pyramidkv: the same with fewer "
        "tokens in later layers; streaming: the first and the newest; pool: the first and the newest, those between "
        "merged; streaming and pool while decoding too; none: all",
    )
    flag("--prompt_capacity", type=int, help="tokens that a layer keeps")
    flag("--prompt_capacity_rate", type=float, help="the same as a fraction of the tokens seen, in (0, 1]")
    flag(
        "--window_size",
        type=int,
        help="newest tokens that stay exact and whose queries vote; for streaming only "
        "how many tokens come while decoding before the next are dropped (default: 32)",
    )
    flag("--kernel_size", type=int, help="neighbours over which snapkv and pyramidkv average votes (default: 5)")
    flag(
        "--sink_tokens",
        type=int,
        help="first tokens that stay exact (default: 4 for streaming and pool, 0 for snapkv and pyramidkv)",
    )
    flag("--pool_type", help="what pool makes of a window of tokens: mean, max or best (default: mean)")
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


def asked_sparsity(config: Any, args: argparse.Namespace) -> Any:
    """The `TokenSparsity` that a model will be used with; None if it keeps all tokens, or is a stock model.

    Raises:
        PaluError: for a value that is not allowed, or a flag that would do nothing.
    """
    from palu.models import is_latent
    from palu.token_sparsity import changed_by_flags

    return changed_by_flags(config.latent.sparsity if is_latent(config) else None, vars(args))


def sparsity_row(config: Any) -> dict[str, Any]:
    """What a model's cache keeps, as entries of a row; nothing where it keeps all tokens."""
    from palu.models import is_latent
    from palu.token_sparsity import FLAGS

    sparsity = config.latent.sparsity if is_latent(config) else None
    if sparsity is None:
        return {}
    names = {setting: flag for flag, setting in FLAGS.items()}
    return {names[name]: value for name, value in sparsity.to_dict().items()}


def sparsity_label(row: dict[str, Any]) -> str:
    """The token policy of a row, in a few words."""
    if "token_sparse_method" not in row:
        return ""
    rate, capacity = row.get("prompt_capacity_rate"), row.get("prompt_capacity")
    return f"{row['token_sparse_method']} {capacity if rate is None else f'{rate:g}'}"


@contextmanager
def told_if_nothing_drops(model: Any) -> Iterator[None]:
    """Warn at the end if a model with a token policy has read prompts and none of its caches dropped a token."""
    from palu.nn.latent_cache import has_dropped

    if not sparsity_row(model.config):
        yield
        return
    dropped: list[bool] = []
    handle = model.register_forward_hook(lambda *call: dropped.append(has_dropped(call[2].past_key_values)))
    try:
        yield
    finally:
        handle.remove()
    if dropped and not any(dropped):
        tell_that_nothing_dropped()


def tell_that_nothing_dropped() -> None:
    """Warn that a token policy had nothing to do."""
    logger.warning("the token policy dropped nothing: no context exceeded its capacity")
