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

    def run() -> Made:
        with torch.inference_mode(False), torch.no_grad():
            if device.type != "cuda":
                return make()
            with torch.cuda.device(device):
                made = make()
                # The caller may work on another stream.
                torch.cuda.current_stream().synchronize()
                return made

    if device.type != "cuda":
        return run()
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(run).result()
