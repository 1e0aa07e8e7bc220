"""Launches Triton kernels; at less cost what was launched before.

At every launch Triton looks at each argument to find what it compiled for such ones, which takes the host longer than a
short kernel takes the GPU. Here what it compiles for is compared all at once. Of its settings (`triton.knobs`) the
hooks of launches count every time, the others at the first launch.
"""

import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

# What is remembered at most.
MOST_KNOWN = 4096
# Triton compiles apart for pointers and numbers that are multiples of this, and for numbers of more bits.
MULTIPLE, NUMBER_BITS = 16, 31
_orders: dict[int, "_Order"] = {}
_known: dict[tuple, tuple[Any, tuple]] = {}


class Constants(dict):
    """A kernel's constants, all of them, and options. They do not change, so that they are hashed once."""

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(self.items()))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, eq=False)
class _Order:
    """A kernel's parameters: so many tensors, numbers that Triton looks at and others, by index, names of constants."""

    kernel: JITFunction
    tensors: int
    looked_at: tuple[int, ...]
    free: tuple[int, ...]
    constants: tuple[str, ...]


def relaunch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, constants: Constants | None = None, **others: Any
) -> None:
    """As `kernel[grid](*arguments, **constants)`, on the device of the tensors.

    Args:
        arguments: tensors, then numbers.
        constants: made once for many launches; else the others, one by one.

    Raises:
        TypeError: for both.
    """
    if constants is None:
        constants = Constants(others)
    elif others:
        raise TypeError(f"relaunch takes constants or {', '.join(others)}, not both")
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, which need not be that of the layer.
        with torch.cuda.device(device):
            relaunch(kernel, grid, *arguments, constants=constants)
        return
    order = _orders.get(id(kernel)) or _order_of(kernel, arguments)
    numbers = [] if order is None else [_kind(arguments[index]) for index in order.looked_at]
    if order is None or None in numbers or any([arguments[index] >> NUMBER_BITS for index in order.free]):
        kernel[grid](*arguments, **constants)
        return
    tensors = arguments[: order.tensors]
    pointers = [tensor.data_ptr() for tensor in tensors]
    aligned = functools.reduce(operator.or_, pointers) % MULTIPLE == 0
    # With the devices, as Triton refuses tensors that are elsewhere, but not addresses.
    key = (
        order, constants, aligned or tuple(pointer % MULTIPLE == 0 for pointer in pointers),
        *[tensor.get_device() for tensor in tensors], *[tensor.dtype for tensor in tensors], *numbers,
    )  # fmt: skip
    known = _known.get(key)
    if known is not None:
        compiled, values = known
        compiled[(*grid, 1, 1)[:3]](*pointers, *arguments[order.tensors :], *values)
        return
    compiled = kernel[grid](*arguments, **constants)
    if isinstance(compiled, CompiledKernel):
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = compiled, tuple(constants[name] for name in order.constants)


def _kind(number: Any) -> Any:
    """What Triton compiles in of a number: that it is one, or a multiple; of no integer its type; None of wide ones."""
    if type(number) is not int:
        return type(number)
    if number >> NUMBER_BITS:
        return None
    return "one" if number == 1 else number % MULTIPLE == 0


def _order_of(kernel: Any, arguments: tuple) -> _Order | None:
    """The kernel's parameters; None of what is interpreted or recorded, and where Triton compiles for other GPUs."""
    if not isinstance(kernel, JITFunction) or torch.version.hip:
        return None
    tensors = sum(isinstance(argument, Tensor) for argument in arguments)
    numbers = kernel.params[tensors : len(arguments)]
    _orders[id(kernel)] = _Order(
        kernel,
        tensors,
        tuple(index for index, number in enumerate(numbers, tensors) if not number.do_not_specialize),
        tuple(index for index, number in enumerate(numbers, tensors) if number.do_not_specialize),
        tuple(parameter.name for parameter in kernel.params[len(arguments) :]),
    )
    return _orders[id(kernel)]
