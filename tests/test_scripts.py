"""The command lines: real runs on the demo model, the effect of every flag, one line for every bad input."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import compress
import run_ppl_eval
from palu import CompressionConfig, QuantizationConfig
from palu.calibrate.text import DEMO_ASSETS
from palu.decompose import DECOMPOSITIONS
from palu.search import SEARCHES
from tests.helpers import in_an_empty_folder, invoke  # noqa: F401 (the first is a fixture)
from utils.report import rank_table
from utils.results import read_results

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--n_whiten_calib_samples", "2", "--n_fisher_calib_samples", "1", "--calib_seqlen", "64"]
SMALL += ["--n_probe_calib_samples", "1"]
NAME = "demo_ratio-0.5_gs-4-global-fisher-sequential"


def compress_rows(*argv):
    """Rows of a small compression of the demo model."""
    assert invoke(compress, *SMALL, "--results", "out.json", "--overwrite", *argv) == 0
    return read_results(Path("out.json"))


def ranks(results):
    return [row["rank"] for row in results["rows"] if row["kind"] == "rank"]


def test_compress_then_evaluate_as_a_user_does():
    python = [sys.executable]
    environment = os.environ | {"COLUMNS": "80", "PYTHONPATH": ""}
    done = subprocess.run([*python, ROOT / "compress.py", *SMALL], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert Path(NAME, "config.json").is_file()
    assert f"checkpoint: {NAME}" in done.stdout
    assert "…" not in done.stdout
    command = [*python, ROOT / "run_ppl_eval.py", "--model_name_or_path", NAME, "--datasets", "demo", "--seqlen", "128"]
    command += ["--max_windows", "3", "--batch_size", "2", "--baseline", DEMO_ASSETS / "model", "--results", "r.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    results = read_results(Path("r.json"))
    latent, stock = results["rows"]
    assert set(latent) >= {
        "model",
        "dataset",
        "seqlen",
        "tokens",
        "perplexity",
        "kv_bytes_per_token",
        "kept_ratio",
        "bits",
    }
    assert latent["tokens"] == 3 * 127
    assert stock["kv_bytes_per_token"] == 5 * 2 * 4 * 64 * 2
    assert latent["kv_bytes_per_token"] <= 0.5 * stock["kv_bytes_per_token"] + 8
    assert 1 < stock["perplexity"] < 100
    assert latent["perplexity"] == pytest.approx(stock["perplexity"], rel=0.1)
    assert results["config"]["seqlen"] == 128
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert {"commit", "device", "seed", "date"} <= set(results["environment"])
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")
    assert Path("results", f"{NAME}_compress.png").is_file()
    assert not [path for path in Path().rglob("*") if "partial" in path.name]


def test_a_baseline_of_the_same_name_keeps_its_own_column(capsys):
    Path("model").symlink_to(DEMO_ASSETS / "model")
    argv = ["--model_name_or_path", DEMO_ASSETS / "model", "--baseline", "model", "--datasets", "demo", "--seqlen", 64]
    assert invoke(run_ppl_eval, *argv, "--max_windows", 1, "--results", "r.json") == 0
    assert "+0.00%" in capsys.readouterr().out
    assert len({row["model"] for row in read_results(Path("r.json"))["rows"]}) == 2


def test_batch_size_does_not_change_the_perplexity():
    values = []
    for batch_size in (1, 3):
        argv = ["--model_name_or_path", DEMO_ASSETS / "model", "--datasets", "demo", "--seqlen", 64, "--max_windows", 5]
        assert invoke(run_ppl_eval, *argv, "--batch_size", batch_size, "--dtype", "float32", "--results", "r.json") == 0
        values.append(read_results(Path("r.json"))["rows"][0]["perplexity"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_several_texts_are_measured_in_one_run():
    Path("mine.txt").write_text("She walked along the shore and thought of nothing. " * 200)
    argv = ["--model_name_or_path", DEMO_ASSETS / "model", "--datasets", "demo,mine.txt", "--seqlen", 64]
    assert invoke(run_ppl_eval, *argv, "--max_windows", 2) == 0
    rows = read_results(Path("results/model_ppl.json"))["rows"]
    assert [row["dataset"] for row in rows] == ["demo", "mine.txt"]
    assert rows[1]["perplexity"] < rows[0]["perplexity"]


def test_the_same_seed_gives_the_same_checkpoint_and_another_seed_does_not():
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        compress_rows("--seed", seed, "--output_dir", name)
    weights = [Path(name, "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@functools.cache
def plain_rows():
    """The record of compressing as the tests' flags say, made once."""
    return compress_rows("--no-dump_huggingface_model")


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["--param_ratio_target", "0.3"], "ranks"),
        (["--head_group_size", "2"], "ranks"),
        (["--head_group_size", "2", "--value_group_size", "all"], "ranks"),
        (["--rank_multiple", "8"], "ranks"),
        (["--search_method", "fisher_uniform"], "ranks"),
        (["--palu"], "ranks"),
        (["--search_method", "fisher", "--head_group_size", "1", "--rank_multiple", "4"], "ranks"),
        (["--n_whiten_calib_samples", "3"], "moments"),
        (["--calib_seqlen", "80"], "moments"),
        (["--n_fisher_calib_samples", "2"], "fisher"),
        (["--fisher_seqlen", "32"], "fisher"),
        (["--seed", "5"], "moments"),
        (["--calib_dataset", str(DEMO_ASSETS / "evaluation.txt")], "moments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_every_flag_changes_what_it_names(argv, changes):
    plain = plain_rows()
    changed = compress_rows("--no-dump_huggingface_model", *argv)
    if changes == "ranks":
        assert ranks(plain) != ranks(changed)
    else:
        key = plain["config"]["calibration"][changes]
        assert key != changed["config"]["calibration"][changes]


def test_decomposition_and_number_format_change_the_weights():
    compress_rows("--output_dir", "a", "--search_method", "uniform")
    compress_rows("--output_dir", "b", "--search_method", "uniform", "--decompose_method", "svd")
    compress_rows("--output_dir", "c", "--search_method", "uniform", "--dtype", "float32", "--max_shard_size", "2MB")
    name = "model.layers.0.self_attn.k_proj.up"
    tensors = {}
    for folder in "ab":
        with safe_open(Path(folder, "model.safetensors"), "pt") as file:
            tensors[folder] = file.get_tensor(name)
    assert tensors["a"].dtype == torch.bfloat16
    assert not torch.equal(tensors["a"], tensors["b"])
    assert json.loads(Path("c", "config.json").read_text())["dtype"] == "float32"
    assert len(list(Path("c").glob("*.safetensors"))) > 1


def test_lt_hadamard_is_folded_and_noted():
    compress_rows("--output_dir", "a", "--lt_hadamard")
    assert json.loads(Path("a", "config.json").read_text())["palu"]["hadamard"] is True


def test_no_dump_writes_no_checkpoint_but_the_record():
    results = compress_rows("--no-dump_huggingface_model")
    assert [path.name for path in Path().iterdir() if path.is_dir()] == []
    summary = results["rows"][0]
    assert summary["kept_ratio"] <= 0.5
    assert summary["latent_bytes_per_token"] == summary["kept_ratio"] * summary["full_bytes_per_token"]


def test_use_cache_keeps_statistics_and_reuses_them():
    compress_rows("--no-dump_huggingface_model")
    assert not Path("cache").exists()
    first = compress_rows("--use_cache", "--output_dir", "a")
    files = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*.safetensors")}
    # Every layer's moments, Fisher information of outputs, probes.
    assert len(files) == 5 + 1 + 1
    again = compress_rows("--use_cache", "--output_dir", "b")
    assert {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*.safetensors")} == files
    assert ranks(first) == ranks(again)
    assert Path("a", "model.safetensors").read_bytes() == Path("b", "model.safetensors").read_bytes()


def test_palu_is_one_flag_away():
    own = ["--search_method", "fisher_uniform", "--decompose_method", "whiten", "--no-sequential"]
    short, long = (compress_rows(*asked, "--output_dir", name) for asked, name in ((["--palu"], "a"), (own, "b")))
    assert ranks(short) == ranks(long)
    assert Path("a", "model.safetensors").read_bytes() == Path("b", "model.safetensors").read_bytes()
    default = compress_rows("--output_dir", "c")
    assert Path("a", "model.safetensors").read_bytes() != Path("c", "model.safetensors").read_bytes()
    assert default["config"]["compression"]["search_method"] == "global"


def test_adapting_to_the_calibration_text_is_told_and_recorded(capsys):
    asked = ["--palu", "--n_whiten_calib_samples", "8", "--adapt", "0.5", "--no-dump_huggingface_model"]
    record = compress_rows(*asked)
    row = next(row for row in record["rows"] if row["kind"] == "adaptation")
    assert record["config"]["compression"]["adapt"] == 0.5
    assert row["model"].endswith("-fisher_uniform-whiten-adapt-0.5")
    assert row["step"] == 0 or row["adapted_loss"] < row["loss"]
    assert row["adapted_divergence"] <= 1.5 * row["divergence"]
    told = " ".join(capsys.readouterr().out.split())
    assert "output projections " + ("were not" if row["step"] == 0 else "tuned on the calibration text") in told


def test_key_cost_moves_ranks_from_keys_to_values():
    kept = []
    # More tokens than directions, so that none is free.
    asked = ["--no-dump_huggingface_model", "--n_whiten_calib_samples", "8", "--search_method", "global"]
    for cost in ("0.2", "5"):
        results = compress_rows(*asked, "--key_cost", cost)
        kept.append(sum(row["rank"] for row in results["rows"] if row["kind"] == "rank" and row["side"] == "key"))
    assert kept[0] > kept[1]


def test_no_group_of_keys_has_more_ranks_than_asked_for():
    results = compress_rows("--no-dump_huggingface_model", "--max_key_rank", "64")
    ranks = {"key": [], "value": []}
    for row in results["rows"]:
        if row["kind"] == "rank":
            ranks[row["side"]].append(row["rank"])
    assert max(ranks["key"]) <= 64 < max(ranks["value"])
    assert results["config"]["max_key_rank"] == 64
    asked = CompressionConfig(max_key_rank=64, key_cost=2)
    assert compress.checkpoint_name("m", asked).endswith("sequential-key_cost-2-max_key_rank-64")
    pieces = CompressionConfig(quantization=QuantizationConfig(2, 2, group_size=32))
    assert compress.checkpoint_name("m", pieces).endswith("sequential-2bit-lgs-32")


@pytest.mark.parametrize(
    ("ranks", "told"), [((256, 256), None), ((288, 32), "one layer keeps more"), ((288, 384), "2 layers keep more")]
)
def test_layers_that_the_fastest_kernel_does_not_take_are_named(ranks, told, capsys):
    common = {"model": "m", "group": 0, "group_dim": 512, "bits": 16}
    rows = [
        {"kind": "rank", "layer": layer, "side": side, "rank": rank if side == "key" else 400} | common
        for layer, rank in enumerate(ranks)
        for side in ("key", "value")
    ]
    summary = {"kind": "summary", "model": "m", "target": 0.5, "target_of": "numbers", "kept_ratio": 0.5}
    summary |= {"latent_bytes_per_token": 1, "full_numbers": 1, "full_bytes_per_token": 2}
    fusion = {"kind": "fusion", "fused": True, "weights_apart": 2, "weights_folded": 1, "latents_fit_a_head": True}
    rank_table({"rows": [summary, *rows, fusion]})
    shown = " ".join(capsys.readouterr().out.split())
    assert (f"{told} than 256 latents of a group's keys" in shown) if told else ("latents of a group's" not in shown)


def test_verbose_logs_what_every_site_loses(capsys):
    compress_rows("--no-dump_huggingface_model")
    assert "of the energy" not in capsys.readouterr().err
    compress_rows("--no-dump_huggingface_model", "--verbose")
    log = capsys.readouterr().err
    assert log.count("of the energy") == 10
    assert "calibration windows" in log


def test_overwrite_replaces_a_checkpoint():
    compress_rows("--output_dir", "a")
    before = Path("a", "model.safetensors").read_bytes()
    compress_rows("--output_dir", "a", "--param_ratio_target", "0.3")
    assert Path("a", "model.safetensors").read_bytes() != before


def test_help_names_every_method(capsys):
    assert invoke(compress, "--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*SEARCHES, *DECOMPOSITIONS))
