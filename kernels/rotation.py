"""Rotary position embedding of cached keys: where the tokens stand, and how slow pairs can be interpolated."""

import bisect
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from palu.kernels.apart import made_apart
from palu.kernels.latents import version_of

# Largest error of an interpolated cosine or sine, about that of rounding them to fp16.
TOLERANCE = 1e-3
FAST_PAIRS = (16, 32, 48)
COLUMNS = (4, 8, 16)
SPANS = (128, 256, 512, 1024)
# Positions of a window.
WINDOW_SPANS = range(512, 4096 + 1, 128)
# Bytes of a block's matrix, written and read, cost as much as this many columns of a product.
COST_OF_BYTES = 300
TURNS = "turns"


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split pairing (RoFormer, arXiv 2104.09864).

    Args:
        states: [..., heads, length, head_dim]; cos, sin: broadcastable to it.
    """
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class Interpolation(NamedTuple):
    """`[cos(s w), sin(s w)] ~ basis [cos_basis, sin_basis]` for the slow pairs and the offsets s of a block.

    fast: pairs of highest frequency, which are not interpolated; basis: float32 [span, columns]; cos_basis, sin_basis:
    float32 [columns, pairs], zero for the fast ones; error: the largest of all entries.
    """

    fast: int
    basis: Tensor
    cos_basis: Tensor
    sin_basis: Tensor
    error: float

    @property
    def span(self) -> int:
        """Positions in a block."""
        return self.basis.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the basis."""
        return self.basis.shape[1]


def interpolate(frequencies: np.ndarray, fast: int, span: int, columns: int) -> Interpolation:
    """The best basis for given sizes: a truncated SVD of `[cos(s w), sin(s w)]` in float64."""
    slow = np.arange(span)[:, None] * frequencies[None, fast:].astype(np.float64)
    table = np.concatenate([np.cos(slow), np.sin(slow)], axis=1)
    left, singular, right = np.linalg.svd(table, full_matrices=False)
    columns_held = min(columns, len(singular))
    basis, factor = np.zeros((span, columns)), np.zeros((columns, table.shape[1]))
    # Entries of the basis are of the order of one, so that fp16 holds them well.
    basis[:, :columns_held] = left[:, :columns_held] * span**0.5
    factor[:columns_held] = right[:columns_held] * singular[:columns_held, None] / span**0.5
    error = float(np.abs(basis @ factor - table).max())
    cos, sin = np.zeros((2, columns, len(frequencies)))
    cos[:, fast:], sin[:, fast:] = np.split(factor, 2, axis=1)
    return Interpolation(fast, *(torch.from_numpy(part).float() for part in (basis, cos, sin)), error)


@functools.lru_cache(maxsize=64)
def best_interpolation(frequencies: tuple[float, ...], queries: int, tolerance: float) -> Interpolation | None:
    """The cheapest interpolation within the tolerance; None if rebuilding every pair costs less.

    Args:
        queries: query heads per kv head; they share rebuilt pairs, but not interpolated ones.
    """
    table = np.asarray(frequencies)
    choices = []
    for fast, span, columns in itertools.product(FAST_PAIRS, SPANS, COLUMNS):
        slow = len(table) - fast
        cost = 2 * fast + queries * columns * (1 + (COST_OF_BYTES + 2 * slow) / span)
        if slow > 0 and cost < 2 * len(table):
            choices.append((cost, fast, span, columns))
    for _, fast, span, columns in sorted(choices):
        found = interpolate(table, fast, span, columns)
        if found.error <= tolerance:
            return found
    return None


class Window(NamedTuple):
    """Interpolation over a window of positions, as a kernel reads it.

    basis: [span, columns], in fp16 where `Rotation.window` gives it; bases: fp16 [2, columns, pairs], of cosines and
    sines, without the fast pairs, zero behind the last one.
    """

    basis: Tensor
    bases: Tensor

    @property
    def span(self) -> int:
        """Positions in a window."""
        return self.basis.shape[0]


@functools.lru_cache(maxsize=64)
def largest_window(
    frequencies: tuple[float, ...], fast: int, slow: int, columns: int, tolerance: float
) -> Window | None:
    """The interpolation of all but the fast pairs over the most positions within the tolerance.

    None if those are too few. slow: room for so many pairs.
    """
    found = functools.cache(lambda span: interpolate(np.asarray(frequencies), fast, span, columns))
    # Errors grow with the window, but for little; what is taken was tried.
    fitting = bisect.bisect_right(WINDOW_SPANS, tolerance, key=lambda span: found(span).error)
    if fitting == 0:
        return None
    best = found(WINDOW_SPANS[fitting - 1])
    bases = torch.stack([best.cos_basis, best.sin_basis])[..., fast:]
    return Window(best.basis, torch.nn.functional.pad(bases, (0, slow - bases.shape[2])).half())


def by_lane(basis: Tensor) -> Tensor:
    """A basis [span, columns] in the order in which four lanes hold a row of a matrix product, in fp16.

    Of columns 2 p and 2 p + 1 as of a pair's cosine and sine in `lane_table`.
    """
    span, columns = basis.shape
    return basis.view(span, columns // 16, 2, 4, 2).permute(0, 3, 1, 4, 2).reshape(span, columns).half()


# The parameters of every model's embedding on the host, and its interpolations on every device.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _made_once(
    frequencies: Tensor, key: tuple, device: torch.device, make: Callable[[tuple[float, ...]], tuple | None]
) -> Any:
    """What `make` gives for a model's frequencies on the host."""
    known = _known.setdefault(frequencies, {})
    if key not in known:
        if "host" not in known:
            known["host"] = tuple(frequencies.double().tolist())
        known[key] = made_apart(device, lambda: make(known["host"]))
    return known[key]


@dataclass(eq=False)
class Rotation:
    """Positions of cached tokens and the rotary embedding that turns their keys.

    positions: integers [batch or 1, length], or [batch or 1, length, groups] where consecutive equal groups of heads
    see tokens of their own; frequencies: the embedding's inverse frequencies [head_dim / 2]; attention_scaling: what
    cos and sin are multiplied with (yarn); tolerance: of interpolated cosines and sines.
    Tables are made when they are first asked for and shared by all layers that are given the same object.
    """

    positions: Tensor
    frequencies: Tensor
    attention_scaling: float = 1.0
    tolerance: float = TOLERANCE
    _tables: dict = field(default_factory=dict, repr=False)

    @property
    def groups(self) -> int:
        """Groups of heads that see tokens of their own; 1 where all see the same."""
        return 1 if self.positions.ndim == 2 else self.positions.shape[2]

    def positions_of(self, groups: int) -> Tensor:
        """Positions of so many groups of heads, [batch or 1, length, groups]: a multiple of those there are, or any."""
        if self.groups == 1:
            return self.positions[..., None].expand(-1, -1, groups)
        return self.positions.repeat_interleave(groups // self.groups, dim=2)

    def narrow(self, start: int, length: int) -> "Rotation":
        """The tokens start .. start + length, with views of the tables made so far."""
        if start == 0 and length == self.positions.shape[1]:
            return self
        tables = {
            key: tuple(table.narrow(1, start, length) for table in made)
            for key, made in self._tables.items()
            if key[0] != TURNS
        }
        positions = self.positions.narrow(1, start, length)
        return Rotation(positions, self.frequencies, self.attention_scaling, self.tolerance, tables)

    def tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of every pair, scaled: [batch or 1, length, head_dim], or [.., length, groups, head_dim]."""

        def make() -> tuple[Tensor, ...]:
            # float32 products as in transformers, so that both round alike.
            angles = self.positions[..., None].float() * self.frequencies.to(self.positions.device, torch.float32)
            tables = (
                torch.cat([table, table], dim=-1) * self.attention_scaling for table in (angles.cos(), angles.sin())
            )
            return tuple(table.to(dtype) for table in tables)

        return self.kept(("all", dtype), make)

    def by_head(self, dtype: torch.dtype, num_heads: int) -> tuple[Tensor, Tensor]:
        """The same for so many heads, [batch or 1, 1 or num_heads, length, head_dim]."""
        cos, sin = self.tables(dtype)
        if self.groups == 1:
            return cos[:, None], sin[:, None]
        count = num_heads // self.groups
        return tuple(table.transpose(1, 2).repeat_interleave(count, dim=1) for table in (cos, sin))

    def kept(self, key: tuple, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Tables of these positions, [batch or 1, length, ...] (but for those of `seen`), made once for all layers."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]

    def seen(self, key: tuple, mask: Tensor | None, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Tables of these positions and a mask, made once for all layers that share both; they are never narrowed."""
        at = None
        if mask is not None:
            at = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, version_of(mask))
        # Keeping the mask keeps its memory from another one.
        return self.kept((TURNS, *key, at), lambda: (*make(), mask))[:-1]

    def turns(
        self, mask: Tensor | None, length: int, interpolation: Interpolation, dtype: torch.dtype, make: Callable
    ) -> tuple[Tensor, Tensor]:
        """What `make` returns for these positions and this mask, made once for all layers that share them."""
        key = (length, interpolation.fast, interpolation.span, interpolation.columns, dtype)
        return self.seen(key, mask, lambda: make(self, mask, length, interpolation, dtype))

    def interpolation(self, queries: int, dtype: torch.dtype) -> Interpolation | None:
        """How slow pairs are interpolated for so many query heads per kv head; its basis in `dtype`."""
        device = self.positions.device

        def make(frequencies: tuple[float, ...]) -> Interpolation | None:
            found = best_interpolation(frequencies, queries, self.tolerance)
            if found is None:
                return None
            basis, cos, sin = found.basis.to(device, dtype), found.cos_basis.to(device), found.sin_basis.to(device)
            return found._replace(basis=basis, cos_basis=cos, sin_basis=sin)

        return _made_once(self.frequencies, ("slow", queries, self.tolerance, device, dtype), device, make)

    def window(self, fast: int, slow: int, columns: int, lanes: bool = False) -> Window | None:
        """How all but the fast pairs are interpolated in windows of positions; None where those would be too small.

        slow: room for so many pairs; lanes: the basis is `by_lane`.
        """
        device = self.positions.device

        def make(frequencies: tuple[float, ...]) -> Window | None:
            found = largest_window(frequencies, fast, slow, columns, self.tolerance)
            if found is None:
                return None
            basis = by_lane(found.basis) if lanes else found.basis.half()
            return Window(basis.to(device), found.bases.to(device))

        key = ("window", fast, slow, columns, lanes, self.tolerance, device)
        return _made_once(self.frequencies, key, device, make)
