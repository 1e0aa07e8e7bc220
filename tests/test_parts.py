"""Adding up parts of the tokens: by the launch that begins early on Hopper, and by the one that all GPUs run."""

import pytest
import torch

from palu.kernels.decode_attention import parts
from palu.kernels.decode_attention.hopper import launch as hopper
from palu.kernels.latents import LatentProjection
from tests.hopper_calls import needs_hopper
from tests.kernel_calls import close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS = 8, 4


def random_means(count, rows, ranks):
    """Means and logarithms of so many parts, in one of which no token is visible, and in float64 what they add up to.

    Returns them and the means of all tokens, [rows, HEADS, rank] with NaN behind a group's rank, which nobody writes.
    """
    found = torch.randn(count, rows, HEADS, max(ranks), device=DEVICE).half()
    logarithms = torch.randn(count, rows, HEADS, device=DEVICE)
    if count > 1:
        found[1], logarithms[1] = 0.0, -1e30
    for head in range(HEADS):
        found[:, :, head, ranks[head // (HEADS // len(ranks))] :] = float("nan")
    weights = torch.exp2(logarithms.double())
    means = (weights[..., None] * found.double()).sum(0) / weights.sum(0)[..., None]
    return hopper.Means(found, logarithms), means


def random_up(ranks, head_dim, biased):
    """The values' up factor and bias."""
    up = torch.randn(KV_HEADS // len(ranks) * head_dim, sum(ranks), device=DEVICE) / max(ranks) ** 0.5
    bias = torch.randn(KV_HEADS * head_dim, device=DEVICE).half() if biased else None
    return LatentProjection(up.half(), ranks, bias)


def outputs_of(means, value, head_dim):
    """The definition: every head's rows of the up factor times its mean latents, [rows, HEADS * head_dim]."""
    expected, groups = [], len(value.ranks)
    for head in range(HEADS):
        group, kv_head = head // (HEADS // groups), head // (HEADS // KV_HEADS)
        offset = sum(value.ranks[:group])
        columns = value.up.double()[:, offset : offset + value.ranks[group]]
        own = columns[kv_head % (KV_HEADS // groups) * head_dim :][:head_dim]
        added = 0.0 if value.bias is None else value.bias.double()[kv_head * head_dim :][:head_dim]
        expected.append(means[:, head, : value.ranks[group]] @ own.T + added)
    return torch.cat(expected, dim=1).cpu()


@needs_hopper
@torch.no_grad()
@pytest.mark.parametrize("count", [1, 5, 16, 40, 64])
@pytest.mark.parametrize(
    "ranks", [(48, 32), (384, 384), (512, 144), (768,)], ids=lambda ranks: "-".join(map(str, ranks))
)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("biased", [True, False])
# So many that programs have a multiprocessor each with the fewest numbers, with more, and not at all.
@pytest.mark.parametrize("rows", [3, 9, 40])
def test_parts_are_added_up_before_their_launch_ends_as_after_it(count, ranks, head_dim, biased, rows):
    found, means = random_means(count, rows, ranks)
    value, query = random_up(ranks, head_dim, biased), torch.empty(rows, HEADS, head_dim, device=DEVICE).half()
    totals = torch.rand_like(found.logarithms) + 0.1
    sums = parts.Parts(found.means.float() * totals[..., None], totals, found.logarithms - totals.log2())
    for output in (
        hopper._combine_early(found, value, query, head_dim),
        parts.combine(sums, value, query, head_dim),
    ):
        assert close(output, outputs_of(means, value, head_dim), "float16")


@torch.no_grad()
@pytest.mark.parametrize(("count", "ranks"), [(3, (784, 48)), (128, (32, 16))])
def test_means_that_the_early_launch_does_not_take_are_added_up_by_the_other(count, ranks):
    found, means = random_means(count, 2, ranks)
    value, query = random_up(ranks, 64, True), torch.empty(2, HEADS, 64, device=DEVICE).half()
    output = hopper._combine_early(found, value, query, 64)
    assert close(output, outputs_of(means, value, 64), "float16")


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 5])
def test_without_an_up_factor_the_means_themselves_come_out(count):
    ranks = (48, 32)
    found, means = random_means(count, 2, ranks)
    output = hopper._combine_early(
        found, LatentProjection(None, ranks), torch.empty(2, HEADS, 64).to(DEVICE).half(), 64
    )
    each = HEADS // len(ranks)
    expected = [means[:, head, : ranks[head // each]] for head in range(HEADS)]
    assert close(output, torch.cat(expected, dim=1).cpu(), "float16")
