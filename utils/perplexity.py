"""Rows of perplexity measurements."""

import dataclasses
from typing import Any

from utils.evaluation import described


def row_of(result: Any, model: Any, label: str, dataset: str, bits: int | None, key_axis: str) -> dict[str, Any]:
    """The flat row of one measurement; bits: of plain quantisation, None where the model's own cache was used."""
    cached = {} if bits is None else {"bits": bits, "value_bits": bits, "hadamard": False}
    measured = {"dataset": dataset, **dataclasses.asdict(result), "plain": None if bits is None else key_axis}
    return described(model, label) | measured | cached
