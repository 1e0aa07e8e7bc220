"""run_lm_eval.py, lm-eval's model class `palu`, and scores behind a cache that drops tokens."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import palu
import run_lm_eval
import run_ppl_eval
from palu.calibrate.text import DEMO_ASSETS
from palu.core.errors import PaluError
from tests.conftest import ROOT
from tests.helpers import invoke

TASKS = ("--include_path", "tests/lm_eval_tasks", "--tasks", "palu_facts,palu_facts_generate", "--device", "cpu")
BASE = DEMO_ASSETS / "model"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """The example tasks name their data relative to it."""
    monkeypatch.chdir(ROOT)


def values(record, model):
    return {(row["task"], row["metric"]): row["value"] for row in record["rows"] if row["model"] == model}


@pytest.mark.parametrize("shots", [None, 2])
def test_the_stock_model_scores_what_lm_eval_itself_gives_it(demo_checkpoint, tmp_path, shots):
    import lm_eval
    from lm_eval.tasks import TaskManager

    results, output = tmp_path / "r.json", tmp_path / "harness"
    flags = ["--baseline", BASE, "--results", results, "--save_results", "--output_dir", output]
    flags += [] if shots is None else ["--num_fewshot", shots]
    assert invoke(run_lm_eval, "--model_name_or_path", demo_checkpoint, *TASKS, *flags) == 0
    record = json.loads(results.read_text())
    expected = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={BASE}",
        tasks=["palu_facts", "palu_facts_generate"],
        task_manager=TaskManager(include_path="tests/lm_eval_tasks"),
        batch_size=8,
        device="cpu",
        num_fewshot=shots,
    )["results"]
    found = values(record, "model")
    assert found["palu_facts", "acc"] == expected["palu_facts"]["acc,none"]
    assert found["palu_facts", "acc_norm"] == expected["palu_facts"]["acc_norm,none"]
    assert found["palu_facts_generate", "exact_match"] == expected["palu_facts_generate"]["exact_match,none"]
    bytes_held = {row["model"]: row["kv_bytes_per_token"] for row in record["rows"]}
    assert bytes_held == {"checkpoint": 5 * 2 * 256 * 2 / 2 + 4, "model": 5 * 2 * 256 * 2 * 1.0}
    (folder,) = output.glob("model_*")
    saved = json.loads((folder / "results.json").read_text())
    assert saved["results"]["palu_facts"]["acc,none"] == expected["palu_facts"]["acc,none"]
    assert saved["palu"]["model"] == "model"
    (samples,) = output.glob("checkpoint_*/samples_palu_facts.jsonl")
    assert len(samples.read_text().splitlines()) == 24
    assert results.with_suffix(".png").is_file()


def test_policies_and_codes_show_in_what_the_cache_holds(demo_checkpoint, tmp_path, capsys):
    policy = ("--token_sparse_method", "streaming", "--prompt_capacity", 6, "--sink_tokens", 2, "--lt_bits", 4)
    results = tmp_path / "r.json"
    flags = (*policy, "--limit", 6, "--results", results, "--batch_size", 4)
    assert invoke(run_lm_eval, "--model_name_or_path", demo_checkpoint, *TASKS, *flags) == 0
    row = json.loads(results.read_text())["rows"][0]
    assert row["token_sparse_method"] == "streaming"
    assert row["bits"] == 4
    assert row["rows"] == 6
    assert row["kv_bytes_per_token"] < 600
    assert "4 bits, streaming 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks", "palu_fact"), "'palu_fact' is no task of lm-eval or --include_path; close: palu_facts"),
        (("--tasks", ","), "--tasks is empty"),
        (("--output_dir", "here"), "--output_dir does nothing without --save_results"),
        (("--limit", "inf"), "--limit inf must be a whole number of rows, or a fraction between 0 and 1"),
        (("--num_fewshot", "24"), "--num_fewshot 24: task palu_facts has 23 examples for a question"),
        (("--limit", "0"), "--limit 0 must be a whole number of rows, or a fraction between 0 and 1"),
        (("--batch_size", "0"), "--batch_size 0 must be at least 1"),
        (("--batch_size", "many"), "'many' is neither a number nor auto nor auto:N"),
        (("--num_fewshot", "-1"), "--num_fewshot -1 must be 0 or more"),
        (("--include_path", "nowhere"), "--include_path nowhere is not a directory"),
        (("--token_sparse_method", "snapkv"), "give either prompt_capacity or prompt_capacity_rate"),
        (("--kernel_size", "3"), "kernel_size does nothing without token_sparse_method"),
        (
            ("--token_sparse_method", "pool", "--prompt_capacity", "64", "--skip_prefill_compression"),
            "skip_prefill_compression drops nothing before decoding",
        ),
        (
            ("--token_sparse_method", "snapkv", "--prompt_capacity", "64", "--lt_bits", "4", "--lt_window", "8"),
            "lt_sinks and lt_window are not for a cache that drops tokens",
        ),
    ],
)
def test_bad_flags_are_refused_in_one_line(demo_checkpoint, flags, message, capsys):
    assert invoke(run_lm_eval, "--model_name_or_path", demo_checkpoint, *TASKS, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_policy_that_dropped_nothing_says_so(demo_checkpoint, tmp_path, capsys):
    flags = ("--limit", 2, "--results", tmp_path / "r.json", "--token_sparse_method", "snapkv", "--prompt_capacity")
    for capacity, says in ((5000, True), (33, False)):
        long = ("--num_fewshot", 23)
        assert invoke(run_lm_eval, "--model_name_or_path", demo_checkpoint, *TASKS, *flags, capacity, *long) == 0
        told = " ".join(capsys.readouterr().err.split())
        assert ("the token policy dropped nothing: no context exceeded its capacity" in told) == says


def test_perplexity_says_so_too(demo_checkpoint, tmp_path, capsys):
    flags = ("--datasets", "demo", "--max_windows", 1, "--seqlen", 200, "--prefill_chunk", 100, "--device", "cpu")
    policy = ("--token_sparse_method", "streaming", "--prompt_capacity")
    for capacity, says in ((5000, True), (60, False)):
        more = (*policy, capacity, "--results", tmp_path / "r.json")
        assert invoke(run_ppl_eval, "--model_name_or_path", demo_checkpoint, *flags, *more) == 0
        assert ("the token policy dropped nothing" in " ".join(capsys.readouterr().err.split())) == says


def test_answers_to_other_questions_are_kept(tmp_path):
    asked = ("--save_results", "--output_dir", tmp_path, "--results", tmp_path / "r.json")
    for more in (("--limit", 2), ("--limit", 3), ("--limit", 3, "--num_fewshot", 1)):
        assert invoke(run_lm_eval, "--model_name_or_path", BASE, *TASKS, *asked, *more) == 0
    rows = [path.read_text().count("\n") for path in tmp_path.glob("model_*/samples_palu_facts.jsonl")]
    assert sorted(rows) == [2, 3, 3]


def test_policies_are_refused_for_a_stock_model(capsys):
    policy = ("--token_sparse_method", "snapkv", "--prompt_capacity", 64)
    assert invoke(run_lm_eval, "--model_name_or_path", BASE, *TASKS, *policy) == 2
    assert "is not a compressed model; --token_sparse_method needs one" in capsys.readouterr().err


def test_lm_evals_own_command_finds_the_model_class_by_name(demo_checkpoint, tmp_path):
    command = [str(Path(sys.executable).with_name("lm_eval")), "run", "--model", "palu"]
    settings = f"pretrained={demo_checkpoint},lt_bits=4,token_sparse_method=snapkv,prompt_capacity=40"
    command += ["--model_args", settings, "--tasks", "palu_facts", "--include_path", "tests/lm_eval_tasks"]
    command += ["--limit", "4", "--device", "cpu", "--output_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "palu_facts" in done.stdout
    from importlib.metadata import entry_points

    assert [point.value for point in entry_points(group="lm_eval.models", name="palu")] == [
        "palu.evaluate.harness:PaluLM"
    ]


def launched(*flags, **environment):
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    command += ["run_lm_eval.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_two_processes_share_the_rows_and_find_the_same(demo_checkpoint, tmp_path):
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    policy = ("--token_sparse_method", "streaming", "--prompt_capacity_rate", 0.5)
    flags = [
        "--model_name_or_path",
        demo_checkpoint,
        *TASKS[:3],
        "palu_facts",
        "--device",
        "cpu",
        "--limit",
        7,
        "--batch_size",
        1,
        *policy,
    ]
    assert invoke(run_lm_eval, *flags, "--results", alone) == 0
    done = launched(*flags, "--results", shared, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    expected, found = (json.loads(path.read_text())["rows"] for path in (alone, shared))
    assert [row["value"] for row in found] == [row["value"] for row in expected]
    # Of both processes' rows, none of which is padded.
    assert found[0]["kv_bytes_per_token"] == expected[0]["kv_bytes_per_token"]
    assert done.stdout.count("record: ") == 1
    # Of seven rows of four answers each, the first process has four rows.
    assert "16/16" in done.stderr
    assert "28/28" not in done.stderr


def test_processes_that_do_not_know_of_each_other_are_refused(demo_checkpoint):
    done = launched("--model_name_or_path", demo_checkpoint, *TASKS)
    assert done.returncode != 0
    assert "error: these 2 processes do not know of each other" in done.stderr


def scored(checkpoint, batch_size, **settings):
    """Log likelihoods of a task's answers, and the bytes that caches held per token."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from palu.evaluate.harness import PaluLM

    lm = PaluLM(str(checkpoint), device="cpu", dtype="float32", batch_size=batch_size, max_length=256, **settings)
    manager = TaskManager(include_path="tests/lm_eval_tasks", include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=["palu_facts"], task_manager=manager, limit=6)["samples"]
    likelihoods = [response[0][0] for sample in found["palu_facts"] for response in sample["resps"]]
    return torch.tensor(likelihoods, dtype=torch.float64), lm.kv_bytes_per_token()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lt_bits": 2, "lt_window": 6},
        {"lt_bits": 2, "lt_sinks": 3},
        {"token_sparse_method": "streaming", "prompt_capacity": 8},
        {"token_sparse_method": "pool", "prompt_capacity": 8, "window_size": 2, "lt_bits": 8},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "as saved",
)
def test_scores_do_not_depend_on_the_batch(demo_checkpoint, settings, caplog):
    alone, bytes_alone = scored(demo_checkpoint, 1, **settings)
    assert "one at a time" not in caplog.text
    together, _ = scored(demo_checkpoint, 5, **settings)
    found, bytes_found = scored(demo_checkpoint, "auto:2", max_batch_size=4, **settings)
    assert (alone - together).abs().max() < 0.01
    assert (alone - found).abs().max() < 0.01
    assert bytes_found == pytest.approx(bytes_alone, rel=0.3)
    assert ("contexts go one at a time" in caplog.text) == bool({"lt_window", "lt_sinks"} & set(settings))


def test_a_damaged_stock_model_is_refused(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(BASE, damaged)
    (file,) = damaged.glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, {"format": "pt"})
    assert invoke(run_lm_eval, "--model_name_or_path", damaged, *TASKS) == 2
    assert "1 missing tensors: model.layers.1.mlp.up_proj.weight" in " ".join(capsys.readouterr().err.split())
    # As it is called where there are GPUs.
    from palu.evaluate.harness import PaluLM

    lm = PaluLM(str(BASE), device="cpu")
    with pytest.raises(PaluError, match="1 missing tensors"):
        lm._create_model(str(damaged), revision="main", gpus=2, offload_folder="./offload", peft=None, subfolder="")


def test_a_checkpoint_that_is_saved_without_a_cache_is_measured_all_the_same(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(BASE, copy)
    config = json.loads((copy / "config.json").read_text()) | {"use_cache": False}
    (copy / "config.json").write_text(json.dumps(config))
    flags = ("--limit", 2, "--results", tmp_path / "r.json")
    assert invoke(run_lm_eval, "--model_name_or_path", copy, *TASKS, *flags) == 0
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["kv_bytes_per_token"] == 5120


def test_clip_ratios_of_latents_as_they_were_are_forgotten_when_these_are_turned(demo_checkpoint, tmp_path):
    from palu.checkpoint import load_model
    from palu.evaluate.harness import PaluLM

    model = load_model(demo_checkpoint)
    sides = {
        side: [[0.9] * len(getattr(layer, side)) for layer in model.config.latent.layers] for side in ("key", "value")
    }
    palu.set_quantization(model, palu.QuantizationConfig(4, 4, clip_ratio="auto", clip_ratios=sides))
    model.save_pretrained(tmp_path / "saved")
    shutil.copy(demo_checkpoint / "tokenizer.json", tmp_path / "saved")
    shutil.copy(demo_checkpoint / "tokenizer_config.json", tmp_path / "saved")
    assert PaluLM(str(tmp_path / "saved"), device="cpu").model.config.latent.quantization.clip_ratios == sides
    with pytest.raises(PaluError, match="has to be searched"):
        PaluLM(str(tmp_path / "saved"), device="cpu", lt_hadamard=True)


def test_means_are_over_tasks_and_of_one_filter_each(capsys):
    from utils.accuracy import accuracy_table

    common = {
        "model": "m",
        "metric": "exact_match",
        "stderr": None,
        "limit": None,
        "kv_bytes_per_token": 0.0,
        "bits": 16,
    }
    common |= {"value_bits": 16, "hadamard": False}
    rows = [
        common | {"task": task, "filter": name, "value": value, "is_group": task == "all"}
        for task, name, value in (
            ("a", "strict", 0.1),
            ("a", "flexible", 0.5),
            ("b", "strict", 0.3),
            ("b", "flexible", 0.7),
            ("all", "strict", 0.9),
        )
    ]
    accuracy_table({"rows": rows})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-2] for line in lines if line[:1] == ["mean"]] == ["0.2000", "0.6000"]
    assert ["KV", "bytes", "per", "token", "-", "-", "-"] in lines


def test_whole_texts_cannot_be_scored_with_a_policy(demo_checkpoint):
    from palu.evaluate.harness import PaluLM

    lm = PaluLM(str(demo_checkpoint), device="cpu", token_sparse_method="streaming", prompt_capacity=64)
    with pytest.raises(PaluError, match="tasks of whole texts have none"):
        lm.loglikelihood_rolling([])
