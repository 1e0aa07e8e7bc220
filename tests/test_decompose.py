"""Factorisations are optimal, exact at full rank and never NaN."""

import pytest
import torch

from palu.core.types import SiteStats
from palu.decompose import DECOMPOSITIONS, get_decomposition


def output_error(weight, factors, inputs):
    return ((weight - factors.up @ factors.down) @ inputs.T).square().sum().item()


@pytest.mark.parametrize(("group_dim", "in_features"), [(12, 40), (40, 40), (48, 30)])
def test_whitened_factors_equal_the_svd_of_the_whitened_weight(group_dim, in_features):
    weight = torch.randn(group_dim, in_features, dtype=torch.float64)
    inputs = torch.randn(500, in_features, dtype=torch.float64) @ torch.randn(in_features, in_features).double()
    gram = inputs.T @ inputs
    factors = get_decomposition("whiten")(weight, SiteStats(gram))
    lower = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(weight @ lower, full_matrices=False)
    for rank in (1, 5, 11):
        best = u[:, :rank] * s[:rank] @ v[:rank] @ torch.linalg.inv(lower)
        kept = factors.truncate(rank)
        assert torch.allclose(kept.up @ kept.down, best, rtol=1e-6, atol=1e-6 * best.abs().max())
        assert output_error(weight, kept, inputs) == pytest.approx(s[rank:].square().sum().item(), rel=1e-6)
        assert factors.energy[rank:].sum().item() == pytest.approx(s[rank:].square().sum().item(), rel=1e-6)
        # Palu splits the singular values evenly over the two factors.
        assert torch.allclose(kept.up.norm(dim=0), s[:rank].sqrt(), rtol=1e-6)


def test_plain_svd_factors_equal_the_svd():
    weight = torch.randn(20, 33)
    factors = get_decomposition("svd")(weight, SiteStats()).truncate(7)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    assert torch.allclose(factors.up @ factors.down, u[:, :7] * s[:7] @ v[:7], atol=1e-8)


@pytest.mark.parametrize("method", ["query", "output", "attention", "fisher"])
def test_weighed_factors_lose_the_least_that_a_metric_counts(method):
    weight, inputs = torch.randn(20, 33).double(), torch.randn(90, 33).double()
    spread = torch.randn(20, 20).double()
    # No eigenvalue is below the floor.
    metric, gram = spread @ spread.T + torch.eye(20), inputs.T @ inputs
    factors = get_decomposition(method)(weight, SiteStats(gram, metric))
    values, basis = torch.linalg.eigh(metric)
    root = basis * values.sqrt() @ basis.T
    _, s, _ = torch.linalg.svd(root @ weight @ torch.linalg.cholesky(gram), full_matrices=False)
    for rank in (1, 7, 19):
        kept = factors.truncate(rank)
        lost = (root @ (weight - kept.up @ kept.down) @ inputs.T).square().sum().item()
        assert lost == pytest.approx(s[rank:].square().sum().item(), rel=1e-6)
        assert lost == pytest.approx(factors.energy[rank:].sum().item(), rel=1e-6)
    assert torch.allclose(factors.up @ factors.down, weight, atol=1e-8)


@pytest.mark.parametrize(
    "values", [[0.0] * 8, [0.0] * 7 + [1.0], [1e-12, 1.0, 1e6, 0.0] * 2], ids=["none", "one", "some"]
)
def test_directions_that_cost_nothing_give_no_nan(values):
    weight = torch.randn(8, 16).double()
    factors = get_decomposition("attention")(weight, SiteStats(torch.eye(16), torch.diag(torch.tensor(values))))
    assert torch.isfinite(factors.up).all()
    assert torch.isfinite(factors.down).all()
    assert torch.allclose(factors.up @ factors.down, weight, atol=1e-8)


@pytest.mark.parametrize("method", list(DECOMPOSITIONS))
def test_full_rank_is_exact(method):
    weight, inputs = torch.randn(24, 40).double(), torch.randn(100, 40).double()
    factors = get_decomposition(method)(weight, SiteStats(inputs.T @ inputs))
    assert torch.allclose(factors.up @ factors.down, weight, atol=1e-10)


def degenerate_inputs():
    one_hot = torch.zeros(9, 40)
    one_hot[:, 3] = 5.0
    constant = torch.randn(200, 40)
    constant[:, 10:30] = 2.0
    outlier = torch.randn(300, 40)
    outlier[:, 0] *= 1e6
    return {
        "fewer tokens than features": torch.randn(5, 40),
        "constant features": constant,
        "a single feature": one_hot,
        "all zero": torch.zeros(10, 40),
        "one feature a million times larger": outlier,
    }


@pytest.mark.parametrize("name", list(degenerate_inputs()))
def test_rank_deficient_inputs_never_give_nan_and_lose_nothing_that_they_span(name):
    weight, inputs = torch.randn(24, 40).double(), degenerate_inputs()[name].double()
    # float32 is what calibration accumulates in.
    factors = get_decomposition("whiten")(weight, SiteStats((inputs.T @ inputs).float()))
    assert torch.isfinite(factors.down).all()
    assert torch.isfinite(factors.up).all()
    assert torch.allclose(factors.up @ factors.down, weight, atol=1e-8 * weight.abs().max())
    rank = min(24, int(torch.linalg.matrix_rank(inputs)))
    energy = (weight @ inputs.T).square().sum().item()
    assert output_error(weight, factors.truncate(rank), inputs) <= 1e-6 * energy


def test_a_zero_weight_gives_zero_and_no_nan():
    factors = get_decomposition("whiten")(torch.zeros(8, 16), SiteStats(torch.eye(16)))
    assert torch.equal(factors.up @ factors.down, torch.zeros(8, 16).double())
