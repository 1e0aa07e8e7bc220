"""Launch configurations: the first of a handful that fit, or, where the environment asks for it, the fastest of all.

The handful and their order were measured offline. With PALU_AUTOTUNE=1 every shape class tries all that fit once, the
first time that it is seen; nothing is tried while a CUDA graph is captured.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

AUTOTUNE = "PALU_AUTOTUNE"
# Milliseconds that a candidate is run for.
WARM_UP, MEASURED = 5, 20
Candidate = TypeVar("Candidate")
_fastest: dict[Hashable, Any] = {}


def searches() -> bool:
    """Whether the environment asks for the full search."""
    return os.environ.get(AUTOTUNE, "") not in ("", "0")


def length_class(length: int) -> int:
    """Lengths of a class share a configuration: powers of two."""
    return length.bit_length()


def pick(
    key: Hashable, candidates: Sequence[Candidate], run: Callable[[Candidate], Any], device: torch.device
) -> Candidate:
    """The first of the candidates, or the fastest one of a shape class where that is searched for.

    Args:
        key: the shape class; candidates of the same key are timed once per device and process.
        run: launches with a candidate.
    """
    if len(candidates) == 1 or not searches():
        return candidates[0]
    known = (key, device)
    if known not in _fastest:
        # What is captured and timed is the current device's.
        with torch.cuda.device(device if device.type == "cuda" else -1):
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return candidates[0]
            _fastest[known] = min(candidates, key=lambda candidate: _milliseconds(lambda: run(candidate)))
    return _fastest[known]


def _milliseconds(launch: Callable[[], Any]) -> float:
    """Median time of a launch; endless if it needs more than a block has, or does not compile."""
    try:
        return triton.testing.do_bench(launch, warmup=WARM_UP, rep=MEASURED, return_mode="median")
    except (OutOfResources, CompilationError):
        return float("inf")
