"""What latencies are compared with: costs worked out by hand, ratios, how calls are timed, tables and plots."""

import itertools
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import in_an_empty_folder  # noqa: F401 (a fixture)
from utils import latency
from utils.console import console
from utils.latency import Cost, Peaks, Timing
from utils.latency_report import attention_table, kernel_table, model_table, plot_latency, profile_table
from utils.latency_shapes import (
    Heads,
    full_attention_cost,
    full_score_cost,
    latent_attention_cost,
    latent_bytes,
    random_latents,
    relative_error,
    score_cost,
)

# 8 query heads on 4 kv heads of 64, two kv heads a latent.
HEADS = Heads(num_heads=8, num_kv_heads=4, head_dim=64, group_size=2)
RANKS = (32, 32)


# Costs, by hand.


def test_bytes_of_latents_are_codes_scales_and_zero_points():
    assert latent_bytes(RANKS, 16) == 128
    assert latent_bytes(RANKS, 8) == 64 + 2 * 2 * 2
    assert latent_bytes(RANKS, 3) == 24 + 8
    assert latent_bytes(RANKS, 2) == 16 + 8


def test_cost_of_scores():
    # 2 rows of 10 tokens: 128 bytes read and 8 scores of 4 bytes written; 64 ranks by 128 numbers, 8 heads by 64.
    assert score_cost(HEADS, RANKS, 16, 2, 10) == Cost(20 * (128 + 32), 2 * 20 * (64 * 128 + 512))
    assert score_cost(HEADS, RANKS, 4, 2, 10).bytes == 20 * (32 + 8 + 32)
    assert full_score_cost(HEADS, 2, 10) == Cost(20 * (4 * 64 * 2 + 8 * 2), 2 * 20 * 512)


def test_cost_of_attention():
    ranks = (RANKS, (64, 64))
    # Values: each of the 4 query heads of a group weighs its 64 latents.
    rebuilt = Cost(20 * (128 + 256), 2 * 20 * (64 * 128 + 512 + 128 * 4))
    assert latent_attention_cost(HEADS, ranks, (16, 16), 2, 10, absorbed=False) == rebuilt
    assert latent_attention_cost(HEADS, ranks, (16, 16), 2, 10, absorbed=True).flops == 2 * 20 * (64 * 4 + 128 * 4)
    assert latent_attention_cost(HEADS, ranks, (8, 8), 2, 10, absorbed=True).bytes == 20 * (64 + 8 + 128 + 8)
    # Keys of 4 bits and values of 8; 3 of the tokens are exact.
    mixed = latent_attention_cost(HEADS, ranks, (4, 8), 2, 10, absorbed=True, exact=3)
    assert mixed.bytes == 2 * (7 * (32 + 8 + 128 + 8) + 3 * (128 + 256))
    # All 8 query heads weigh the latents of all values.
    joint = latent_attention_cost(HEADS, (RANKS, (128,)), (16, 16), 2, 10, absorbed=False)
    assert joint == Cost(20 * (128 + 256), 2 * 20 * (64 * 128 + 512 + 128 * 8))
    assert full_attention_cost(HEADS, 2, 10) == Cost(20 * 2 * 4 * 64 * 2, 4 * 20 * 512)


def test_the_design_notes_floor_of_a_full_cache_comes_out():
    heads = Heads(32, 32, 128, 4)
    memory, compute = latency.floors(full_attention_cost(heads, 1, 65536), Peaks(4.3e12, 6.7e14))
    assert memory == pytest.approx(249.7, rel=1e-3)
    assert compute < memory


def test_columns_of_cost():
    row = latency.cost_columns(Timing(50.0, 49.0, 51.0), Cost(100_000_000, 2_000_000_000), Peaks(4e12, 5e14))
    assert row["memory_floor_microseconds"] == pytest.approx(25)
    assert row["compute_floor_microseconds"] == pytest.approx(4)
    assert row["floor_microseconds"] == pytest.approx(25)
    assert row["fraction_of_floor"] == pytest.approx(0.5)
    assert row["terabytes_per_second"] == pytest.approx(2)
    assert row["teraflops_per_second"] == pytest.approx(40)


def test_columns_of_what_could_not_be_measured_hold_its_cost_but_no_time():
    row = latency.timing_columns(None, "why") | latency.cost_columns(None, Cost(100, 100), Peaks(4e12, 5e14))
    assert row["microseconds"] is None
    assert row["fraction_of_floor"] is None
    assert row["first_call_seconds"] is None
    assert row["bytes"] == 100
    assert row["note"] == "why"


# Timing.


def test_timing_is_median_and_percentiles():
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Timing(3.5, 2.0, 5.0)


def test_input_sets_are_several_times_the_l2_cache():
    assert latency.sets_needed(100, 50) == 2
    assert latency.sets_needed(10_000, 50) == 2
    assert latency.sets_needed(10, 50) == 20
    assert latency.sets_needed(1, 10_000) == latency.MOST_SETS


def test_calls_rotate_over_the_sets(monkeypatch):
    monkeypatch.setattr(latency, "l2_bytes", lambda device: 50)
    made = []

    def make():
        made.append(lambda: None)
        return made[-1]

    calls = latency.rotating_calls(make, 20, "cuda:0")
    assert len(made) == 10
    assert calls[:20] == made + made
    assert len(calls) >= latency.LEAST_CALLS


@pytest.mark.parametrize("rest", [0.0, 3.0])
def test_counters_are_reset_before_every_run_and_only_runs_are_timed(rest, monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = [lambda: log.append("call")] * 3
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", lambda seconds: log.append(seconds))
    timing = latency.time_calls(calls, 2, graph=False, before=lambda: log.append("before"), rest=rest)
    once = ["before", "call", "call", "call"]
    # After a rest, of as many times both runs, they run once more, so that the clock is up.
    timed = [*([2 * rest, *once] if rest else []), "before", "event", "call", "call", "call", "event"]
    assert log == ["before", "call", *once, *(once if rest else []), *timed, *timed]
    assert timing[:3] == (2000.0, 2000.0, 2000.0)
    assert timing.first_call == 1


def test_ratios_are_to_the_fastest_baseline_of_the_same_length_and_batch():
    def row(provider, length, batch, time):
        fields = {"provider": provider, "prompt_len": length, "batch_size": batch, "microseconds": time}
        return fields | {"baseline": provider != "latents"}

    rows = [row("a", 1, 1, 30.0), row("b", 1, 1, 20.0), row("c", 1, 1, None), row("latents", 1, 1, 10.0)]
    rows += [row("a", 1, 2, 50.0), row("latents", 1, 2, 100.0), row("latents", 2, 1, 7.0)]
    latency.add_ratios(rows)
    ratios = [row["ratio_to_fastest_baseline"] for row in rows]
    assert ratios == [pytest.approx(2 / 3), 1.0, None, 2.0, 1.0, 0.5, None]


def test_what_does_not_fit_or_is_missing_becomes_a_note():
    def fail(error):
        raise error

    assert latency.attempt(lambda: 3) == (3, None)
    assert latency.attempt(lambda: fail(torch.OutOfMemoryError("CUDA"))) == (None, "out of memory")
    missing = latency.attempt(lambda: fail(RuntimeError("No available kernel.\nmore")), optional=True)
    assert missing == (None, "not available here: No available kernel")
    with pytest.raises(RuntimeError, match="a bug"):
        latency.attempt(lambda: fail(RuntimeError("a bug")))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_baselines_compute_attention(name):
    query, keys, values = torch.randn(2, 8, 1, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (keys, values)]
    expected = torch.softmax(query @ repeated[0].mT * 0.3, dim=-1) @ repeated[1]
    assert torch.allclose(latency.full_attention(name, query, keys, values, 0.3), expected, atol=1e-5)


@pytest.mark.parametrize("bits", [16, 8, 3])
def test_random_latents_are_drawn_in_pieces_and_fill_every_token(bits, monkeypatch):
    monkeypatch.setattr("utils.latency_shapes.PIECE", 7 * 2 * 64)
    latents = random_latents(2, 40, RANKS, bits, "cpu")
    assert latents.shape == (2, 40, 64)
    numbers = latents if bits == 16 else latents.dequantized(torch.float32)
    assert float(numbers.float().std(dim=-1).min()) > 0.5


def test_relative_error_is_of_all_groups_together():
    expected = torch.randn(2, 3, 8, dtype=torch.float64)
    parts = expected.chunk(4, dim=-1)
    assert relative_error(expected * 1.01, lambda group: parts[group], 4, dim=-1) == pytest.approx(0.01)


# Tables and plots from a canned result.


def canned(**changes):
    row = {
        "kind": "latency",
        "provider": "latents",
        "prompt_len": 262144,
        "batch_size": 8,
        "bits": 4,
        "baseline": False,
        "microseconds": 11369.25,
        "p20": 11345.5,
        "p80": 11401.75,
        "first_call_seconds": 7.25,
        "note": None,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "group_size": 4,
        "relative_error": 0.0004,
        "model_shape": "llama-3-8b",
        "tokens_per_second": 703.7,
        "peak_bytes": 61_234_000_000,
        "cache_bytes": 34_359_738_368,
        "ratio_to_fastest_baseline": 1.894,
    }
    row |= latency.cost_columns(Timing(11369.25, 0, 0), Cost(4_294_967_296, 600_000_000_000), Peaks(4.27e12, 6.7e14))
    missing = dict.fromkeys(
        ["microseconds", "p20", "p80", "first_call_seconds", "fraction_of_floor", "terabytes_per_second"]
    )
    missing |= dict.fromkeys(["teraflops_per_second", "tokens_per_second", "peak_bytes", "cache_bytes"])
    missing |= {"relative_error": None, "ratio_to_fastest_baseline": None, "note": "out of memory"}
    other = row | missing | {"provider": "sdpa_cudnn", "baseline": True}
    profile = {"kind": "profile", "kernel": "scores_kernel" * 12, "calls_per_step": 2.0, "microseconds_per_step": 31.0}
    config = {
        "model_shape": "llama-3-8b",
        "batch_size": 8,
        "profiled": "latents",
        "peaks": Peaks(4.27e12, 6.7e14)._asdict(),
    }
    return {"rows": [row | changes, other, profile], "config": config, "environment": {"device": "NVIDIA H200"}}


@pytest.mark.parametrize("table", [kernel_table, attention_table, model_table])
def test_tables_show_every_figure_in_80_columns(table, capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 80)
    table(canned())
    text = capsys.readouterr().out
    assert "…" not in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("256k"))
    assert row[:3] == ["256k", "latents", "4"]
    times = ["11.37", "11.35-11.40"] if table is model_table else ["11369", "11346-11402"]
    assert row[-len(row) + (3 if table is kernel_table else 4) :][:2] == times
    assert row[-1] == "1.89"
    assert "relative error to float64, latents 4: 4.0e-04 (8 x 256k)" in text
    assert "sdpa_cudnn: out of memory (8 x 256k)" in text
    assert "longest first call, with what Triton had to compile: 7.2 s (latents 4, 8 x 256k)" in " ".join(text.split())
    table(canned(relative_error=0.003))
    assert "3.0e-03 (8 x 256k, BEYOND 0.002)" in capsys.readouterr().out


def test_the_profile_table_shows_shares(capsys):
    profile_table(canned())
    text = capsys.readouterr().out
    assert "31.00" in text
    assert "100%" in text


def test_the_plot_takes_rows_without_a_time():
    plot_latency(canned(), Path("p.png"))
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
