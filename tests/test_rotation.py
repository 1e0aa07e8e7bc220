"""Rotations of cached keys: exact tables, and slow pairs interpolated within what was asked for."""

import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from palu.kernels.latent_scores.tables import fast_table
from palu.kernels.rotation import (
    COLUMNS,
    FAST_PAIRS,
    SPANS,
    TOLERANCE,
    Rotation,
    best_interpolation,
    by_lane,
    interpolate,
)

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
BASES = [1e4, 5e5, 1e6, "llama3"]


def frequencies_of(base, head_dim):
    """float32, as models hold them."""
    if base == "llama3":
        config = LlamaConfig(head_dim=head_dim, hidden_size=head_dim, rope_parameters=LLAMA3)
        return ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    return (base ** (-torch.arange(0, head_dim, 2).double() / head_dim)).float()


def worst_entry(found, frequencies):
    """The largest difference from cosines and sines in float64, entry by entry of the slow pairs."""
    worst = 0.0
    for pair in range(found.fast, len(frequencies)):
        turn = torch.polar(torch.ones(()).double(), torch.arange(found.span) * frequencies[pair].double())
        for exact, factor in ((turn.real, found.cos_basis), (turn.imag, found.sin_basis)):
            worst = max(worst, (found.basis.double() @ factor[:, pair].double() - exact).abs().max().item())
    return worst


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("queries", [1, 4, 8])
def test_interpolation_is_as_good_as_it_says_and_within_the_tolerance(base, head_dim, queries):
    frequencies = frequencies_of(base, head_dim)
    found = best_interpolation(tuple(frequencies.double().tolist()), queries, TOLERANCE)
    if found is None:
        # Many queries: no choice that costs less than rebuilding all pairs is good enough.
        assert queries > 1
        return
    assert (found.fast in FAST_PAIRS, found.span in SPANS, found.columns in COLUMNS) == (True, True, True)
    assert found.error <= TOLERANCE
    assert worst_entry(found, frequencies) == pytest.approx(found.error, abs=2e-6)
    assert not found.cos_basis[:, : found.fast].any()
    assert not found.sin_basis[:, : found.fast].any()


@pytest.mark.parametrize("base", BASES)
def test_tighter_tolerances_are_kept_too(base):
    frequencies = frequencies_of(base, 128)
    found = best_interpolation(tuple(frequencies.double().tolist()), 1, 1e-6)
    assert found is None or worst_entry(found, frequencies) < 3e-6


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fast", [16, 32])
def test_more_columns_are_more_exact(base, fast):
    frequencies = frequencies_of(base, 128)
    found = [interpolate(frequencies.double().numpy(), fast, 256, columns) for columns in COLUMNS]
    # The mean square is what the basis is best for; the largest error may rise a little while both are large.
    angles = torch.arange(256)[:, None] * frequencies[fast:].double()
    exact = torch.cat([angles.cos(), angles.sin()], 1)
    factors = [torch.cat([each.cos_basis[:, fast:], each.sin_basis[:, fast:]], 1).double() for each in found]
    squares = [(each.basis.double() @ factor - exact).norm() for each, factor in zip(found, factors, strict=True)]
    assert all(more < less + 1e-4 for less, more in itertools.pairwise(squares))
    assert found[-1].error < found[0].error / 2


def test_no_interpolation_where_rebuilding_all_pairs_costs_less():
    frequencies = tuple(frequencies_of(1e4, 64).double().tolist())
    assert best_interpolation(frequencies, 64, TOLERANCE) is None
    assert best_interpolation(frequencies[:16], 1, 1.0) is None


def test_an_unfillable_basis_is_padded_with_zeros():
    found = interpolate(np.array([1.0, 0.5, 0.01]), 2, 128, 8)
    assert found.basis.shape == (128, 8)
    assert not found.basis[:, 2:].any()
    assert found.error < 1e-6


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize(("fast", "columns"), [(16, 32), (32, 4), (32, 8)])
def test_windows_are_within_the_tolerance_and_as_large_as_that_allows(base, head_dim, fast, columns):
    frequencies = frequencies_of(base, head_dim)
    found = Rotation(torch.arange(9)[None], frequencies).window(fast, 64 - fast, columns, lanes=fast == 16)
    host = tuple(frequencies.double().tolist())
    if found is None:
        assert interpolate(np.asarray(host), fast, 512, columns).error > TOLERANCE
        return
    assert found.bases.shape == (2, columns, 64 - fast)
    assert found.span == 4096 or interpolate(np.asarray(host), fast, found.span + 128, columns).error > TOLERANCE
    basis = found.basis.double()
    if fast == 16:
        # Back from the order of four lanes.
        basis = basis.view(found.span, 4, columns // 16, 2, 2).permute(0, 2, 4, 1, 3).reshape(found.span, columns)
        assert torch.equal(by_lane(basis.float()), found.basis)
    angles = torch.arange(found.span)[:, None] * frequencies[fast:].double()
    pairs = angles.shape[1]
    for exact, factor in zip((angles.cos(), angles.sin()), found.bases.double(), strict=True):
        # Rounded to fp16 on top of the tolerance.
        assert (basis @ factor[:, :pairs] - exact).abs().max() < 4 * TOLERANCE
    assert not found.bases[..., pairs:].any()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_tables_hold_the_angles_of_every_row(base, scaling):
    frequencies, positions = frequencies_of(base, 64), torch.randint(0, 100, (3, 7))
    cos, sin = Rotation(positions, frequencies, scaling).tables(torch.float32)
    angles = positions[..., None].double() * frequencies.double()
    for table, exact in ((cos, angles.cos()), (sin, angles.sin())):
        assert table.dtype == torch.float32
        assert torch.allclose(table.double(), torch.cat([exact, exact], -1) * scaling, atol=1.5e-5)
    for row in range(3):
        alone = Rotation(positions[row : row + 1], frequencies, scaling).tables(torch.float32)
        assert torch.equal(alone[0][0], cos[row])
        assert torch.equal(alone[1][0], sin[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pairs", FAST_PAIRS)
@pytest.mark.parametrize("highest", [1000, 1_000_000])
def test_the_fast_table_holds_the_first_pairs_in_turns_unscaled(pairs, dtype, highest):
    positions, device = torch.randint(0, highest, (2, 70)), "cuda" if torch.cuda.is_available() else "cpu"
    rotation = Rotation(positions.to(device), frequencies_of(1e4, 128).to(device), attention_scaling=2.0)
    table = fast_table(rotation, pairs, dtype)
    assert table.shape == (2, 70, 2 * pairs)
    for place, full in enumerate(rotation.tables(torch.float32)):
        worst = (table[..., place::2].float() - full[..., :pairs] / 2).abs().max()
        assert worst < (4e-7 if dtype == torch.float32 else 5e-4)
    assert fast_table(rotation, pairs, dtype) is table


def test_narrow_shares_tables_and_keeps_the_rest():
    rotation = Rotation(torch.randint(0, 1000, (2, 9)), frequencies_of(1e4, 64), 1.5, 1e-4)
    assert rotation.narrow(0, 9) is rotation
    tables = rotation.tables(torch.float32)
    part = rotation.narrow(3, 4)
    assert torch.equal(part.positions, rotation.positions[:, 3:7])
    assert (part.frequencies is rotation.frequencies, part.attention_scaling, part.tolerance) == (True, 1.5, 1e-4)
    for cut, whole in zip(part.tables(torch.float32), tables, strict=True):
        assert cut.data_ptr() == whole[:, 3:].data_ptr()
        assert torch.equal(cut, whole[:, 3:7])


def test_turns_of_a_whole_are_not_those_of_a_part():
    rotation = Rotation(torch.arange(600)[None], frequencies_of(1e4, 128))
    found = rotation.interpolation(1, torch.float16)
    made = []
    make = lambda turned, *_: made.append(turned.positions.shape[1]) or (torch.zeros(1), torch.zeros(1))  # noqa: E731
    for turned in (rotation, rotation, rotation.narrow(100, 300)):
        turned.turns(None, turned.positions.shape[1], found, torch.float16, make)
    assert made == [600, 300]


def test_an_interpolation_is_made_once_per_embedding():
    frequencies = frequencies_of(1e4, 128)
    first, second = (Rotation(torch.arange(5)[None], frequencies).interpolation(1, torch.float16) for _ in range(2))
    assert first is second
    assert first.basis.dtype == torch.float16
