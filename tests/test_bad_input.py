"""Bad input of the command lines: one line, exit code 2, nothing left behind."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch

import compress
import run_ppl_eval
from palu.calibrate.text import DEMO_ASSETS
from tests.helpers import in_an_empty_folder, invoke  # noqa: F401 (the first is a fixture)

SMALL = ["--n_whiten_calib_samples", "2", "--n_fisher_calib_samples", "1", "--calib_seqlen", "64"]

BAD_COMPRESS = [
    (["--param_ratio_target", "0"], "param_ratio_target 0.0 is the kept fraction and must lie in (0, 1]"),
    (["--param_ratio_target", "1.5"], "must lie in (0, 1]"),
    (["--param_ratio_target", "nan"], "must lie in (0, 1]"),
    (["--param_ratio_target", "0.01"], "use a ratio of at least"),
    (["--head_group_size", "3"], "head_group_size 3 does not divide the model's 4 kv heads; use 1, 2, 4 or all"),
    (["--value_group_size", "8"], "value_group_size 8 does not divide"),
    (["--head_group_size", "0"], "must be a number of kv heads or 'all'"),
    (["--calib_dataset", "wikitext3"], "data set 'wikitext3' is unknown"),
    (["--calib_dataset", "wikitext2"], "give a .txt, .jsonl, .json or .parquet file"),
    (["--calib_dataset", "empty.txt"], "empty.txt: the text is empty"),
    (["--calib_dataset", "short.txt"], "are too few for one window of 64"),
    (["--calib_seqlen", "4096"], "calib_seqlen 4096 must lie in 2..2048"),
    (["--calib_seqlen", "1"], "calib_seqlen 1 must be a number of at least 2"),
    (["--n_whiten_calib_samples", "0"], "n_whiten_calib_samples 0 must be a number of at least 1"),
    (["--rank_multiple", "0"], "rank_multiple 0 must be a number of at least 1"),
    (["--model_id", "./nowhere"], "./nowhere: no model directory"),
    (["--model_id", "org/none"], "org/none: no such directory here, and the hub cannot be reached"),
    (["--model_id", "broken"], "broken: the config cannot be loaded"),
    (["--model_id", "cut"], "cut/model.safetensors is damaged"),
    (["--model_id", "gpt2"], "model family 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"),
    (["--output_dir", "exists"], "output directory exists exists; choose another or pass --overwrite"),
    (["--fisher_seqlen", "0"], "fisher_seqlen 0 must be a number of at least 2"),
    (["--model_id", "demo", "--output_dir", "demo", "--overwrite"], "output directory demo is the model that is read"),
    (["--output_dir", "."], "exists; choose another"),
    (["--output_dir", ".", "--overwrite"], "holds the current directory"),
    (["--output_dir", "short.txt/x"], "is not a directory that can be written to"),
    (["--results", "exists"], "--results exists is a directory"),
    (["--results", "short.txt/x.json"], "is not a directory that can be written to"),
    (["--results", "out.png"], "the plot takes that name"),
    (["--max_shard_size", "big"], "max_shard_size 'big' must be a whole number with KB, MB or GB"),
    (["--use_cache", "--cache_dir", "short.txt"], "short.txt"),
    (["--search_method", "best"], "search_method 'best' is unknown; use one of uniform, fisher, fisher_uniform"),
    (
        ["--decompose_method", "qr"],
        "decompose_method 'qr' is unknown; use one of whiten, query, output, attention, fisher, svd",
    ),
    (["--palu", "--decompose_method", "svd"], "--palu says what --decompose_method is; leave one of them out"),
    (["--adapt", "2"], "adapt 2.0 must be a share from 0, which does nothing, to 1"),
    (["--palu", "--sequential"], "--palu says what --sequential is"),
    (
        ["--n_whiten_calib_samples", "1"],
        "sequential needs n_whiten_calib_samples of two or more; or turn sequential off",
    ),
    (["--regroup"], "regroup does nothing in groups of one or of all 4 kv heads"),
    (["--search_method", "global_bits", "--lt_hadamard", "--lt_bits", "16"], "chooses the bits; give no lt_bits"),
    (["--max_key_rank", "16"], "no rank up to max_key_rank 16 is a multiple of rank_multiple 32"),
    (["--max_key_rank", "0"], "max_key_rank 0 must be a number of at least 1"),
    (
        ["--max_key_rank", "14", "--rank_multiple", "7", "--lt_hadamard"],
        "no rank up to max_key_rank 14 is a multiple of rank_multiple 7 and has a Hadamard matrix",
    ),
    (
        ["--max_key_rank", "64", "--param_ratio_target", "0.9"],
        "max_key_rank 64 leaves no more than 0.6250 of the cache",
    ),
    (
        ["--search_method", "global_bits", "--lt_hadamard", "--key_cost", "2"],
        "key_cost 2.0 is for the search_method",
    ),
    (["--search_method", "global_bits"], "search_method global_bits plans for turned latents; give lt_hadamard"),
    (
        ["--search_method", "global_bits", "--lt_hadamard", "--param_ratio_target", "0.02"],
        "leaves 102 bytes per token for 10 groups; use a ratio of at least",
    ),
    (["--device", "tpu"], "device 'tpu' is not available; use cpu"),
    (["--dtype", "int8"], "dtype 'int8' is unknown; use auto, float32, bfloat16, float16"),
]


def make_bad_inputs():
    Path("exists").mkdir()
    Path("demo").symlink_to(DEMO_ASSETS / "model")
    Path("empty.txt").write_text("\n")
    Path("short.txt").write_text("too short")
    for name, text in (("broken", "{"), ("gpt2", '{"model_type": "gpt2"}')):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)

    Path("cut").mkdir()
    for source in (DEMO_ASSETS / "model").iterdir():
        Path("cut", source.name).write_bytes(source.read_bytes()[:5_000_000])


def tree():
    return sorted(str(path) for path in Path().rglob("*"))


def one_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(("argv", "message"), BAD_COMPRESS, ids=[" ".join(argv) for argv, _ in BAD_COMPRESS])
def test_bad_input_of_compress_is_one_line_and_leaves_nothing(argv, message, capsys):
    make_bad_inputs()
    before = tree()
    settings = ["--n_whiten_calib_samples", "2", "--n_fisher_calib_samples", "1", "--calib_seqlen", "64"]
    assert invoke(compress, *settings, *argv) == 2
    assert message in one_line(capsys)
    assert tree() == before


def test_no_space_is_found_out_before_the_work(capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 10, 0))
    assert invoke(compress, *SMALL) == 2
    line = one_line(capsys)
    assert "no space for" in line
    assert "demo_ratio-0.5" in line
    assert tree() == []


def test_nan_in_the_weights_names_the_tensor(capsys):
    from palu.checkpoint import load_model, load_tokenizer

    model = load_model(DEMO_ASSETS / "model")
    with torch.no_grad():
        model.model.layers[3].self_attn.v_proj.weight[0, 0] = float("nan")
    model.save_pretrained("bad")
    load_tokenizer(DEMO_ASSETS / "model").save_pretrained("bad")
    before = tree()
    assert invoke(compress, *SMALL, "--model_id", "bad", "--calib_dataset", "demo") == 2
    assert "model.layers.3.self_attn.v_proj.weight" in one_line(capsys)
    assert tree() == before


BAD_PPL = [
    (["--seqlen", "4096"], "--seqlen 4096 must lie in 2..2048"),
    (["--datasets", "nothing"], "data set 'nothing' is unknown"),
    (["--datasets", "short.txt"], "too few for one window"),
    (["--datasets", ","], "--datasets is empty"),
    (["--batch_size", "0"], "--batch_size 0 must be at least 1"),
    (["--max_windows", "0"], "--max_windows 0 must be at least 1"),
    (["--baseline", "./nowhere"], "./nowhere: no model directory"),
    (["--baseline", "gpt2", "--seqlen", "64"], "gpt2: no weights (*.safetensors)"),
    (["--baseline", "cut", "--seqlen", "64"], "cut/model.safetensors is damaged"),
    (["--results", "x.png"], "the plot takes that name"),
    (["--device", "cuda:9"], "device 'cuda:9' is not available"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_PPL, ids=[" ".join(argv) for argv, _ in BAD_PPL])
def test_bad_input_of_the_perplexity_script_is_one_line_and_leaves_nothing(argv, message, capsys):
    make_bad_inputs()
    before = tree()
    assert invoke(run_ppl_eval, "--model_name_or_path", DEMO_ASSETS / "model", "--datasets", "demo", *argv) == 2
    assert message in one_line(capsys)
    assert tree() == before
