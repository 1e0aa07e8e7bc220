"""Cosines and sines of cached tokens, made once per forward pass in one launch and shared by the layers."""

import torch
from torch import Tensor

from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latent_scores.layout import DTYPES, row_strides
from palu.kernels.latent_scores.weights import table_kernel
from palu.kernels.relaunch import relaunch
from palu.kernels.rotation import Rotation

# Tokens of a program.
TOKENS = 64


def fast_table(rotation: Rotation, pairs: int, dtype: torch.dtype) -> Tensor:
    """cos and sin of the first pairs in turns: [batch or 1, length, 2 * pairs].

    Angles are float32 products as in transformers, so that both round alike; not scaled.
    """
    return rotation.kept(("fast", pairs, dtype), lambda: (_table(rotation, pairs, pairs, 1, dtype),))[0]


def lane_table(rotation: Rotation, dtype: torch.dtype, pairs: int | None = None) -> Tensor:
    """cos and sin of the first pairs, or of all, in the order in which four lanes hold a row of a matrix product.

    [batch or 1, length, columns]: pairs padded to a power of two with zeros, the numbers of pairs 0, 4, 8, .. first:
    cosines of 0 and 4, their sines, cosines of 8 and 12, ..
    """
    pairs = pairs or rotation.frequencies.shape[0]
    columns = next_power_of_2(pairs)
    return rotation.kept(("lanes", pairs, dtype), lambda: (_table(rotation, pairs, columns, 4, dtype),))[0]


def _table(rotation: Rotation, pairs: int, stored: int, lanes: int, dtype: torch.dtype) -> Tensor:
    positions = rotation.positions
    rows, length = positions.shape
    table = torch.empty(rows, length, 2 * stored, dtype=dtype, device=positions.device)
    frequencies = rotation.frequencies.to(positions.device, torch.float32)
    relaunch(
        table_kernel, (cdiv(length, TOKENS), rows),
        positions, frequencies, table, length, *row_strides(positions),
        PAIRS=pairs, STORED=stored, COLUMNS=next_power_of_2(stored), LANES=lanes, TOKENS=TOKENS,
        DTYPE=DTYPES[dtype],
    )  # fmt: skip
    return table
