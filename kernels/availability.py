"""Whether Triton computes: on a GPU, where it is installed, unless the environment forbids it."""

import importlib.util
import os

from torch import Tensor

FORCE_REFERENCE = "PALU_FORCE_REFERENCE"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def uses_kernels(tensor: Tensor) -> bool:
    """Whether this machine and the environment let Triton compute on this tensor."""
    return tensor.is_cuda and HAS_TRITON and not os.environ.get(FORCE_REFERENCE)
