"""Tensors that outlive the step that first needs them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Made = TypeVar("Made")


def made_apart(device: torch.device, make: Callable[[], Made]) -> Made:
    """What `make` returns, on a GPU made by a thread of its own, without gradients and outside of inference mode.

    While torch.compile warms a CUDA graph up, all that its thread allocates belongs to the graph and must not outlive
    the step ("tensors in the cudagraph pool not tracked as outputs"). What is kept for later steps must not be of it.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        with torch.inference_mode(False), torch.no_grad():
            return make()
    # On the caller's stream, so that what is read has been written, and what is made is there for what comes next.
    stream = torch.cuda.current_stream(device)

    def run() -> Made:
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(run).result()
