"""Hadamard matrices by construction: Sylvester, Paley I and II over any finite field, and their products.

Matrices of +1 and -1 with `H H^T = n I` (R. Paley, "On orthogonal matrices", 1933). Orders that no such product reaches
(92, 116, ... need Williamson's or later constructions) are refused. An order is split into a core and the largest power
of two that leaves a core which can be constructed; the power's part is Sylvester's, which a fast transform computes.
"""

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from palu.core.errors import PaluError

SMALLEST_FAST = 8  # the fast kernel works on vectors of multiples of this
Element = tuple[int, ...]  # coefficients of a polynomial over GF(p), constant first


@functools.cache
def is_reachable(order: int) -> bool:
    """Whether `hadamard(order)` can be constructed."""
    return order >= 1 and _core_and_power(order) is not None


def nearest_reachable(order: int) -> int:
    """The closest reachable order, the smaller of two equally close ones."""
    candidates = (order + sign * distance for distance in itertools.count() for sign in (-1, 1))
    return next(candidate for candidate in candidates if candidate >= 1 and is_reachable(candidate))


@functools.cache
def hadamard(order: int) -> Tensor:
    """A Hadamard matrix, int8 [order, order].

    Raises:
        PaluError: with the nearest order that can be reached.
    """
    if not is_reachable(order):
        raise PaluError(
            f"no Hadamard matrix of order {order} can be constructed; the nearest is {nearest_reachable(order)}"
        )
    core, power = _core_and_power(order)
    return torch.kron(_core(core), _sylvester(power))


def orthonormal_hadamard(order: int) -> Tensor:
    """`hadamard(order) / sqrt(order)`, float64: its transpose is its inverse."""
    return hadamard(order).double() / order**0.5


def hadamard_transform(rows: Tensor) -> Tensor:
    """`orthonormal_hadamard(n) @ rows` for rows [n, columns], in float64, or by a fast kernel in float32.

    The kernel is fast_hadamard_transform's (Dao), where it is installed and the rows are on a GPU.

    Raises:
        PaluError: if no Hadamard matrix of order n can be constructed.
    """
    order = rows.shape[0]
    matrix = hadamard(order)
    core, power = _core_and_power(order)
    transform = _fast_transform(rows.device) if power >= SMALLEST_FAST else None
    if transform is None:
        return matrix.to(rows.device, torch.float64) @ rows.double() / order**0.5
    by_core = rows.float().T.contiguous().view(-1, core, power)
    turned = transform(by_core, order**-0.5)
    return (_core(core).to(turned) @ turned).flatten(1).T


def _fast_transform(device: torch.device) -> Callable[[Tensor, float], Tensor] | None:
    """`transform(x, scale)`: Sylvester's matrix times scale along the last dimension; None where there is no kernel."""
    if device.type != "cuda" or importlib.util.find_spec("fast_hadamard_transform") is None:
        return None
    return importlib.import_module("fast_hadamard_transform").hadamard_transform


@functools.cache
def _core_and_power(order: int) -> tuple[int, int] | None:
    """The split `order = core * power` with the largest power of two, or None if there is no core."""
    power = order & -order
    while power >= 1:
        core = order // power
        if core == 1 or _paley(core) is not None or _split(core) is not None:
            return core, power
        power //= 2
    return None


def _core(order: int) -> Tensor:
    """A Hadamard matrix that is not Sylvester's: 1, one of Paley's, or a product of two reachable ones."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if (method := _paley(order)) is not None:
        return method(order)
    small, large = _split(order)
    return torch.kron(hadamard(small), hadamard(large))


def _sylvester(order: int) -> Tensor:
    """Of a power of two: `H_2n = [[1, 1], [1, -1]] x H_n`."""
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.kron(two, matrix)
    return matrix


def _split(order: int) -> tuple[int, int] | None:
    """Two reachable factors that are multiples of four, or None."""
    return next(
        (
            (small, order // small)
            for small in range(4, int(order**0.5) + 1, 4)
            if order % small == 0 and is_reachable(small) and is_reachable(order // small)
        ),
        None,
    )


def _paley(order: int):  # noqa: ANN202 (one of the two functions below, or None)
    if order % 4 == 0 and _prime_power(order - 1) and (order - 1) % 4 == 3:
        return _paley_one
    if order % 4 == 0 and _prime_power(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return _paley_two
    return None


def _paley_one(order: int) -> Tensor:
    """`I + S` with S skew-symmetric, of order q + 1 for a prime power q = 3 mod 4."""
    conference = _bordered_jacobsthal(order - 1, corner_sign=-1)
    return conference + torch.eye(order, dtype=torch.int8)


def _paley_two(order: int) -> Tensor:
    """`S x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]`, of order 2 (q + 1) for a prime power q = 1 mod 4."""
    conference = _bordered_jacobsthal(order // 2 - 1, corner_sign=1)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, _sylvester(2)) + torch.kron(torch.eye(order // 2, dtype=torch.int8), diagonal)


def _bordered_jacobsthal(field_order: int, corner_sign: int) -> Tensor:
    """Conference matrix [[0, 1], [corner_sign, Q]] with `Q_ij = chi(a_i - a_j)`, chi the quadratic character."""
    prime, degree = _prime_power(field_order)
    elements = list(itertools.product(range(prime), repeat=degree))
    modulus = _irreducible(prime, degree)
    squares = {_multiply(element, element, prime, modulus) for element in elements if any(element)}
    values = torch.full((prime,) * degree, -1, dtype=torch.int8)
    for square in squares:
        values[square] = 1
    values[(0,) * degree] = 0
    table = torch.tensor(elements)
    differences = (table[:, None] - table[None]) % prime
    jacobsthal = values[tuple(differences.unbind(-1))]
    matrix = torch.ones(field_order + 1, field_order + 1, dtype=torch.int8)
    matrix[0, 0] = 0
    matrix[1:, 0] = corner_sign
    matrix[1:, 1:] = jacobsthal
    return matrix


@functools.cache
def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with p prime and p^k = number, or None."""
    if number < 2:
        return None
    prime = next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)
    degree = 0
    while number % prime == 0:
        number //= prime
        degree += 1
    return (prime, degree) if number == 1 else None


def _multiply(a: Element, b: Element, prime: int, modulus: Element) -> Element:
    """Product in GF(p)[x] modulo the monic polynomial x^k + modulus."""
    degree = len(modulus)
    product = [0] * (2 * degree - 1)
    for i, j in itertools.product(range(degree), repeat=2):
        product[i + j] += a[i] * b[j]
    for power in range(2 * degree - 2, degree - 1, -1):
        for i in range(degree):
            product[power - degree + i] -= product[power] * modulus[i]
    return tuple(coefficient % prime for coefficient in product[:degree])


@functools.cache
def _irreducible(prime: int, degree: int) -> Element:
    """Lower coefficients of a monic irreducible polynomial: no monic one of at most half its degree divides it."""
    divisors = [
        (*lower, 1) for half in range(1, degree // 2 + 1) for lower in itertools.product(range(prime), repeat=half)
    ]
    candidates = itertools.product(range(prime), repeat=degree)
    return next(lower for lower in candidates if all(any(_remainder((*lower, 1), d, prime)) for d in divisors))


def _remainder(dividend: Element, divisor: Element, prime: int) -> Element:
    """Remainder of polynomials over GF(p), constant first; `divisor` is monic."""
    rest = list(dividend)
    size = len(divisor)
    for top in range(len(rest) - 1, size - 2, -1):
        factor = rest[top]
        for offset in range(size):
            rest[top - size + 1 + offset] = (rest[top - size + 1 + offset] - factor * divisor[offset]) % prime
    return tuple(rest[: size - 1])
