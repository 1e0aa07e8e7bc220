"""The latency scripts without a GPU: dry runs with a fake clock, records, one line for every bad input."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run_latency_attention
import run_latency_kernel
from palu.models import is_latent
from tests.helpers import in_an_empty_folder, invoke  # noqa: F401 (the first is a fixture)
from tests.test_bad_input import one_line, tree
from tests.test_house import ROOT, fake_kernels_distribution
from utils import latency, latency_model, latency_shapes
from utils.latency import Peaks, Timing
from utils.random_models import MODEL_SHAPES
from utils.results import read_results

BOTH = (run_latency_kernel, run_latency_attention)
SMALL = ["--num_heads", 4, "--head_dim", 64, "--group_size", 2, "--repeats", 2, "--results", "r.json"]
KERNEL = [*SMALL, "--total_rank", 64, "--target_seq_lens", "40,72", "--bits", "16,3"]
ATTENTION = [*SMALL, "--palu", "--rank_k", 64, "--rank_v", 96, "--prompt_len", "40,72", "--bits", "16,4"]
MODEL = ["--palu", "--scope", "model", "--prompt_len", "20,33", "--batch_size", 2, "--bits", "16,4"]
MODEL += ["--repeats", 1, "--results", "r.json"]


@pytest.fixture
def fake_gpu(monkeypatch):
    """Everything runs once on the CPU and takes 100 us, the n-th measurement 10 us more than the one before."""
    taken = []

    def time_calls(calls, repeats, graph=True, before=None, rest=0.0):
        for call in dict.fromkeys(calls):
            if before is not None:
                before()
            call()
        taken.append((len(calls), repeats, graph, rest))
        return Timing(90.0 + 10 * len(taken), 80.0, 120.0)

    monkeypatch.setattr(latency, "select_gpu", lambda name: "cpu")
    monkeypatch.setattr(latency, "l2_bytes", lambda device: 1)
    monkeypatch.setattr(latency, "measure_peaks", lambda device, rest: Peaks(4e12, 5e14))
    monkeypatch.setattr(latency, "time_calls", time_calls)
    monkeypatch.setattr(latency, "free_memory", lambda: None)
    monkeypatch.setitem(MODEL_SHAPES, "llama-2-7b", MODEL_SHAPES["tiny"])
    return taken


def test_help_and_flags_need_no_torch():
    code = "import run_latency_kernel, run_latency_attention, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_script_runs_where_the_kernels_distribution_is_installed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(fake_kernels_distribution(tmp_path))}
    command = [sys.executable, "run_latency_attention.py", "--bits", "5"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --bits 5 must be one of 16, 8, 4, 3, 2"


# Dry runs: all of a script but the clock.


def test_the_kernel_script_writes_record_csv_and_plot(fake_gpu, capsys):
    assert invoke(run_latency_kernel, *KERNEL, "--check") == 0
    results = read_results(Path("r.json"))
    providers = [(row["prompt_len"], row["provider"], row["bits"]) for row in results["rows"]]
    ways = [("full keys", 16), ("rebuild", 16), ("kernel", 16), ("rebuild", 3), ("kernel", 3)]
    assert providers == [(length, *way) for length in (40, 72) for way in ways]
    for row in results["rows"]:
        assert (row["relative_error"] is not None) == (row["provider"] == "kernel")
        assert row["relative_error"] is None or row["relative_error"] < 2e-3
    kernel = results["rows"][2]
    assert kernel["ratio_to_fastest_baseline"] == pytest.approx(100 / 120)
    assert kernel["bytes"] == 40 * (64 * 2 + 4 * 4)
    assert results["config"]["peaks"] == {"bytes_per_second": 4e12, "flops_per_second": 5e14}
    assert fake_gpu[0][1:] == (2, True, 3.0)
    with Path("r.csv").open() as file:
        assert [row["provider"] for row in csv.DictReader(file)] == [name for _, name, _ in providers]
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")
    assert "relative error to float64" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--num_kv_heads", 2],
        ["--no_rope"],
        ["--no-cuda_graph", "--batch_size", "1,3"],
        ["--num_kv_heads", 2, "--key_biases"],
        ["--num_kv_heads", 2, "--key_norm"],
        ["--value_group_size", "all", "--no_rope"],
        ["--value_group_size", 1, "--rank_v", 128, "--key_biases"],
    ],
)
def test_the_attention_script_measures_latents_beside_baselines(flags, fake_gpu, capsys):
    assert invoke(run_latency_attention, *ATTENTION, *flags, "--check") == 0
    results = read_results(Path("r.json"))
    latents = [row for row in results["rows"] if row["provider"] == "latents"]
    assert {row["bits"] for row in latents} == {16, 4}
    assert all(row["relative_error"] < 5e-3 for row in latents)
    sizes = dict(zip(flags[::2], flags[1::2], strict=False)).get("--value_group_size", 2)
    assert {row["value_group_size"] for row in latents} == {4 if sizes == "all" else sizes}
    assert ("of values" in capsys.readouterr().out) == (sizes != 2)
    eager = [row for row in results["rows"] if row["provider"] == "eager"]
    assert all(row["microseconds"] for row in eager)
    assert len(results["rows"]) == 2 * len(results["config"]["batch_size"]) * 5
    cudnn = next(row for row in results["rows"] if row["provider"] == "sdpa_cudnn")
    assert cudnn["microseconds"] is None
    assert cudnn["note"].startswith("not available here")
    fields = "provider prompt_len batch_size bits microseconds p20 p80 bytes flops floor_microseconds"
    assert set(fields.split()) | {"ratio_to_fastest_baseline", "num_heads"} <= set(results["rows"][0])
    assert fake_gpu[0][2] == ("--no-cuda_graph" not in flags)


def test_values_may_have_other_bits_and_some_tokens_be_exact(fake_gpu, capsys):
    flags = ["--bits", 4, "--value_bits", 8, "--sinks", 3, "--window", 5, "--check"]
    assert invoke(run_latency_attention, *ATTENTION, *flags) == 0
    rows = [row for row in read_results(Path("r.json"))["rows"] if row["provider"] == "latents"]
    assert {(row["bits"], row["value_bits"], row["sinks"], row["window"]) for row in rows} == {(4, 8, 3, 5)}
    assert all(row["relative_error"] < 5e-3 for row in rows)
    # Two groups of 32 latents of keys and of values, whose codes have 4 bytes of scales and zero points.
    for row in rows:
        codes = row["rank_k"] // 2 + row["rank_v"] + 2 * 2 * 4
        assert row["bytes"] == (row["prompt_len"] - 8) * codes + 8 * 2 * (row["rank_k"] + row["rank_v"])
    assert "latents 4/8" in capsys.readouterr().out


def test_without_palu_only_the_chosen_baseline_is_measured(fake_gpu):
    flags = [flag for flag in ATTENTION if flag != "--palu"]
    assert invoke(run_latency_attention, *flags, "--baseline", "eager") == 0
    assert [row["provider"] for row in read_results(Path("r.json"))["rows"]] == ["eager", "eager"]


def test_memory_that_does_not_suffice_costs_one_row(fake_gpu, monkeypatch):
    drawn = latency_shapes.random_latents

    def random_latents(batch, length, *rest):
        if length == 72:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return drawn(batch, length, *rest)

    monkeypatch.setattr("utils.latency_attention.random_latents", random_latents)
    assert invoke(run_latency_attention, *ATTENTION) == 0
    rows = [row for row in read_results(Path("r.json"))["rows"] if row["provider"] == "latents"]
    assert [row["note"] for row in rows] == [None, None, "out of memory", "out of memory"]
    assert rows[0]["ratio_to_fastest_baseline"] > 0


def test_the_model_scope_measures_steps_of_both_models(fake_gpu):
    assert invoke(run_latency_attention, *MODEL, "--torch_profile") == 0
    results = read_results(Path("r.json"))
    rows = [row for row in results["rows"] if row["kind"] == "latency"]
    assert len(rows) == 2 * (3 + 2)
    latents = [row for row in rows if row["provider"] == "latents"]
    stock = [row for row in rows if row["provider"] == "stock sdpa"]
    # 2 layers of 4 heads of 32; 34 tokens of which the last is new, in 2 rows.
    assert stock[-1]["cache_bytes"] == 2 * 2 * 34 * 2 * 128 * 2
    # Half of it, and a position of 4 bytes per token.
    assert latents[-2]["cache_bytes"] == stock[-1]["cache_bytes"] // 2 + 2 * 34 * 4
    assert latents[-1]["cache_bytes"] < latents[-2]["cache_bytes"] / 3
    assert latents[-1]["tokens_per_second"] == pytest.approx(2 / latents[-1]["microseconds"] * 1e6)
    assert all(row["ratio_to_fastest_baseline"] for row in latents)
    assert Path("r.trace.json.gz").is_file()
    assert results["config"]["profiled"] == "latents, 16 bits, 2 x 20"


def test_the_model_scope_keeps_as_much_of_values_as_asked_for(fake_gpu, monkeypatch):
    seen, latent_model = [], latency_model.latent_model
    monkeypatch.setattr(latency_model, "latent_model", lambda *args: seen.append(latent_model(*args)) or seen[-1])
    assert invoke(run_latency_attention, *MODEL, "--value_share", 0.5, "--group_size", 2) == 0
    (layer, *_) = seen[0].config.latent.layers
    assert layer.key == layer.value == (32, 32)


def test_both_models_are_compiled_where_that_is_asked_for(fake_gpu, monkeypatch):
    seen = []
    monkeypatch.setattr("utils.latency_model.compiled", lambda model: seen.append(is_latent(model)) or model)
    assert invoke(run_latency_attention, *MODEL, "--baseline", "sdpa_flash") == 0
    assert not seen
    assert invoke(run_latency_attention, *MODEL, "--compile") == 0
    assert set(seen) == {True, False}
    assert read_results(Path("r.json"))["config"]["compile"]


# Bad input, which is found out on every machine, before the GPU is asked for.

BAD = [
    (["--group_size", "3"], "--group_size 3 does not divide the model's 32 kv heads; use 1, 2, 4, 8, 16, 32 or all"),
    (["--group_size", "x"], "'x' is neither a number of kv heads nor 'all'"),
    (["--num_heads", "30", "--num_kv_heads", "8"], "--num_heads 30 must be a multiple of --num_kv_heads 8"),
    (["--num_kv_heads", "0"], "--num_kv_heads 0 must be at least 1"),
    (["--num_kv_heads", "2"], "--group_size 4 does not divide the model's 2 kv heads; use 1, 2 or all"),
    (["--head_dim", "80"], "--head_dim 80 must be one of 64, 96, 128"),
    (["--bits", "5"], "--bits 5 must be one of 16, 8, 4, 3, 2"),
    (["--bits", "few"], "'few' must be numbers such as 8,4,2"),
    (["--repeats", "0"], "--repeats 0 must be at least 1"),
    (["--batch_size", "0"], "--batch_size 0 must be at least 1"),
    (["--rest", "-1"], "--rest -1.0 must be from 0 to 100"),
    (["--rest", "nan"], "--rest nan must be from 0 to 100"),
    (["--rope_base", "0"], "--rope_base 0.0 must be a number above 1"),
    (["--rope_base", "nan"], "--rope_base nan must be a number above 1"),
    (["--results", "x.png"], "the plot takes that name"),
    (["--results", "x.csv"], "the CSV takes that name"),
    (["--results", "."], "--results . is a directory"),
    (["--device", "tpu"], "device 'tpu' is not available; use cpu"),
    (["--device", "cpu"], "latency is measured on a CUDA GPU, and --device cpu gives none"),
    (["--seed", "-1"], "no whole number from 0"),
    (["--nothing"], "unrecognized arguments: --nothing"),
]
BAD_KERNEL = [
    (
        ["--total_rank", "1000"],
        "--total_rank 1000 must be a multiple of 128 (16 for each of 8 groups), from 128 to 4096",
    ),
    (["--total_rank", "8192"], "from 128 to 4096"),
    (["--total_rank", "0"], "--total_rank 0 must be a multiple of"),
    (["--target_seq_lens", "0,5"], "--target_seq_lens 0 must be at least 1"),
    (["--target_seq_lens", "4k"], "'4k' must be whole numbers such as 4096,65536"),
]
BAD_ATTENTION = [
    (["--rank_k", "1000"], "--rank_k 1000 must be a multiple of 128"),
    (["--rank_v", "-128"], "--rank_v -128 must be a multiple of 128"),
    (["--palu", "--value_group_size", "3"], "--value_group_size 3 does not divide the model's 32 kv heads"),
    (
        ["--palu", "--value_group_size", "8", "--rank_v", "4160"],
        "--rank_v 4160 must be a multiple of 64 (16 for each of 4 groups), from 64 to 4096",
    ),
    (["--prompt_len", "-1"], "--prompt_len -1 must be at least 1"),
    (["--baseline", "fa4"], "invalid choice: 'fa4'"),
    (["--check"], "--check compares the latents with float64; it needs --palu"),
    (["--no_rope"], "--no_rope changes the latents only; it needs --palu"),
    (["--window", "4"], "--window changes the latents only; it needs --palu"),
    (["--palu", "--value_bits", "5"], "--value_bits 5 must be one of 16, 8, 4, 3, 2"),
    (["--palu", "--window", "4"], "--window is for tokens beside codes; with it --bits must be below 16"),
    (["--value_bits", "0"], "--value_bits changes the latents only; it needs --palu"),
    (["--palu", "--bits", "4", "--value_bits", "16", "--sinks", "4"], "with it --value_bits must be below 16"),
    (["--palu", "--bits", "4", "--sinks", "-1"], "--sinks -1 must be at least 0"),
    (
        ["--palu", "--bits", "4", "--sinks", "65536"],
        "--sinks and --window, 65536 tokens, must be fewer than --prompt_len",
    ),
    (["--key_norm"], "--key_norm changes the latents only; it needs --palu"),
    (["--palu", "--no_rope", "--key_biases"], "--key_biases is for keys that are rotated, which --no_rope says no to"),
    (["--compile"], "--compile is for --scope model; the scope here is attention"),
    (["--model_shape", "llama-3-8b"], "--model_shape is for --scope model; the scope here is attention"),
    (["--scope", "model", "--no_rope"], "--no_rope is for --scope attention; the scope here is model"),
    (["--scope", "model", "--rank_k", "512"], "--rank_k is for --scope attention"),
    (["--value_group_size", "8"], "--value_group_size changes the latents only; it needs --palu"),
    (["--scope", "model", "--value_group_size", "8"], "--value_group_size is for --scope attention"),
    (["--scope", "model", "--check"], "--check is for --scope attention"),
    (["--scope", "model", "--kept_ratio", "0.9"], "--kept_ratio 0.9 with --value_share 0.75 keeps 135% of the values"),
    (["--scope", "model", "--value_share", "1"], "keeps 0% of the keys; it must be more than nothing and at most all"),
    (["--value_share", "0.5"], "--value_share is for --scope model; the scope here is attention"),
    (["--scope", "model", "--model_shape", "tiny"], "invalid choice: 'tiny'"),
    (["--scope", "model", "--model_shape", "llama-3-8b", "--group_size", "16"], "divide the model's 8 kv heads"),
]
CASES = [(script, *case) for script in BOTH for case in BAD]
CASES += [(run_latency_kernel, *case) for case in BAD_KERNEL] + [
    (run_latency_attention, *case) for case in BAD_ATTENTION
]


@pytest.mark.parametrize(("script", "argv", "message"), CASES, ids=[f"{c[0].__name__} {' '.join(c[1])}" for c in CASES])
def test_bad_input_is_one_line_and_leaves_nothing(script, argv, message, capsys):
    assert invoke(script, *argv) == 2
    assert message in one_line(capsys)
    assert tree() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", BOTH)
def test_without_a_gpu_there_is_one_clear_line(script, capsys):
    assert invoke(script) == 2
    assert "latency is measured on a CUDA GPU, and --device auto gives none" in one_line(capsys)
    assert tree() == []
