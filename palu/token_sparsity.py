"""Which tokens a compressed model's cache keeps: the validated settings, saved with a checkpoint where they are set."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from palu.core.validate import is_count, require

POOL_TYPES = ("mean", "max", "best")
# The settings by the names that they have as flags, where users give them one by one.
FLAGS = {
    "token_sparse_method": "method",
    "prompt_capacity": "capacity",
    "prompt_capacity_rate": "capacity_rate",
    "window_size": "window_size",
    "kernel_size": "kernel_size",
    "sink_tokens": "sink_tokens",
    "pool_type": "pool_type",
    "pyramid_beta": "pyramid_beta",
    "skip_prefill_compression": "skip_prefill_compression",
}
NO_METHOD = "none"
# What every method takes beside the capacity, with its defaults.
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "snapkv": {"window_size": 32, "kernel_size": 5, "sink_tokens": 0},
    "pyramidkv": {"window_size": 32, "kernel_size": 5, "sink_tokens": 0, "pyramid_beta": 20.0},
    "streaming": {"window_size": 32, "sink_tokens": 4, "skip_prefill_compression": False},
    "pool": {
        "window_size": 32,
        "sink_tokens": 4,
        "pool_type": "mean",
        "pyramid_beta": 1.0,
        "skip_prefill_compression": False,
    },
}


@dataclass(frozen=True)
class TokenSparsity:
    """A token policy and its settings; what is None takes the method's default, or is not for that method.

    method: `snapkv`, `pyramidkv`, `streaming` or `pool`.
    capacity: tokens that a layer keeps (of the first layer, or on average over the layers, where they differ).
    capacity_rate: the same as a fraction of the tokens seen, in (0, 1]; instead of `capacity`.
    window_size: newest tokens that are kept exact and, where a method goes by attention, whose queries vote; methods
        that also drop while decoding do so when as many tokens more than the capacity have come.
    kernel_size: neighbours over which votes are averaged, odd.
    sink_tokens: first tokens that are kept exact.
    pool_type: what becomes of a window of older tokens: their mean, their maximum, or the best of them.
    pyramid_beta: steepness of the budgets over the layers.
    skip_prefill_compression: drop nothing before decoding.
    """

    method: str
    capacity: int | None = None
    capacity_rate: float | None = None
    window_size: int | None = None
    kernel_size: int | None = None
    sink_tokens: int | None = None
    pool_type: str | None = None
    pyramid_beta: float | None = None
    skip_prefill_compression: bool | None = None

    def __post_init__(self) -> None:
        require(
            self.method in METHOD_SETTINGS,
            f"token_sparse_method {self.method!r} is unknown; use one of {', '.join(METHOD_SETTINGS)}",
        )
        taken = METHOD_SETTINGS[self.method]
        for name in sorted({name for settings in METHOD_SETTINGS.values() for name in settings}):
            if getattr(self, name) is None and name in taken:
                object.__setattr__(self, name, taken[name])
            methods = ", ".join(method for method, settings in METHOD_SETTINGS.items() if name in settings)
            useless = getattr(self, name) is not None and name not in taken
            require(not useless, f"{name} does nothing with token_sparse_method {self.method}; it is for {methods}")
        self._check_values()
        given = (self.capacity is None) + (self.capacity_rate is None)
        require(given == 1, "give either prompt_capacity or prompt_capacity_rate")
        if self.capacity is not None:
            valid = is_count(self.capacity) and self.capacity >= self.least
            require(
                valid,
                f"prompt_capacity {self.capacity!r} must be a number of at least {self.least}, more than what "
                f"{self.method} always keeps",
            )
        else:
            rate = self.capacity_rate
            valid = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate <= 1
            require(valid, f"prompt_capacity_rate {rate!r} must lie in (0, 1]")

    def _check_values(self) -> None:
        for name, least in (("window_size", 1), ("kernel_size", 1), ("sink_tokens", 0)):
            value = getattr(self, name)
            valid = value is None or (is_count(value) and value >= least)
            require(valid, f"{name} {value!r} must be a number of tokens of at least {least}")
        require(self.kernel_size is None or self.kernel_size % 2 == 1, f"kernel_size {self.kernel_size} must be odd")
        pool = self.pool_type
        require(pool in (None, *POOL_TYPES), f"pool_type {pool!r} must be one of {', '.join(POOL_TYPES)}")
        beta = self.pyramid_beta
        valid = beta is None or (isinstance(beta, int | float) and 1 <= beta < math.inf)
        require(valid, f"pyramid_beta {beta!r} must be a number of at least 1")
        skip = self.skip_prefill_compression
        require(skip in (None, True, False), f"skip_prefill_compression {skip!r} must be True or False")

    @property
    def always_kept(self) -> int:
        """Tokens of a row that no budget takes away: the sinks and, where it is exact, the window."""
        return self.sink_tokens + (0 if self.method == "streaming" else self.window_size)

    @property
    def least(self) -> int:
        """The smallest capacity that leaves a choice."""
        return self.always_kept + 1

    def capacity_of(self, length: int) -> int:
        """Tokens that are kept of so many seen, before budgets differ from layer to layer."""
        if self.capacity is not None:
            return self.capacity
        # The slack keeps products such as 0.7 * 10 from being rounded up.
        return max(self.least, math.ceil(self.capacity_rate * length - 1e-9))

    def check_drops_before_decoding(self) -> None:
        """Refuse to be used where nothing is decoded, and so nothing would be dropped.

        Raises:
            PaluError: if it leaves prompts whole.
        """
        require(
            not self.skip_prefill_compression,
            "skip_prefill_compression drops nothing before decoding, and what is scored is not decoded",
        )

    def to_dict(self) -> dict[str, Any]:
        """What is set, for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, entries: Any) -> "TokenSparsity":
        """Parse the JSON entry.

        Raises:
            PaluError: if it is malformed.
        """
        known = {f.name for f in fields(cls)}
        valid = isinstance(entries, Mapping) and set(entries) <= known and "method" in entries
        require(valid, f"'palu' block: 'sparsity' must hold a method and may hold {', '.join(sorted(known))}")
        return cls(**entries)


def changed_by_flags(sparsity: TokenSparsity | None, flags: Mapping[str, Any]) -> TokenSparsity | None:
    """What the flags of `FLAGS` ask for: a policy, changes of the one that was there, or nothing new.

    Those that are None are not given.

    Raises:
        PaluError: for a value that is not allowed, or a flag that would do nothing.
    """
    given = {setting: flags[flag] for flag, setting in FLAGS.items() if flags.get(flag) is not None}
    method = given.pop("method", None)
    if method not in (None, NO_METHOD):
        return TokenSparsity(method, **given)
    if method is None and sparsity is not None and given:
        kept = sparsity.to_dict()
        if {"capacity", "capacity_rate"} & set(given):
            kept = {name: value for name, value in kept.items() if name not in ("capacity", "capacity_rate")}
        return TokenSparsity(**(kept | given))
    useless = [flag for flag, setting in FLAGS.items() if setting in given]
    require(
        not useless, f"{''.join(useless[:1])} does nothing without token_sparse_method {', '.join(METHOD_SETTINGS)}"
    )
    return sparsity if method is None else None
