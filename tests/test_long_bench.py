"""run_long_bench.py: prompts, cuts, stop rules, scores, and going on after being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run_long_bench
from palu.calibrate.text import DEMO_ASSETS
from palu.core.errors import PaluError
from palu.evaluate.long_bench import DEFAULT_TASKS, load_task, mean_scores, prompt_tokens, read_rows, task_names
from palu.evaluate.prediction_log import PredictionLog
from tests.conftest import ROOT
from tests.helpers import in_an_empty_folder, invoke  # noqa: F401
from utils.harness import long_bench_manager

BASE = DEMO_ASSETS / "model"
STORY = "The old man lived by the sea. He had a boat, a dog and a lamp. Every morning he went out to fish. "
ROWS = {
    "qasper": [(STORY * 8, f"What did he have, {n}?", ["a boat, a dog and a lamp"], None, 100) for n in range(3)],
    "triviaqa": [(STORY * 4, f"Passage {n}\nWhere did he live?\nAnswer:", ["by the sea"], None, 50) for n in range(3)],
    "trec": [(STORY, "Question: Who lived?\nType:", ["Human being"], ["Human being", "Place", "Number"], 20)],
    "lcc": [("def add(a, b):\n    return a + b\n", "", ["def sub(a, b):"], None, 10)],
    "passage_count_e": [(STORY * 2, "", ["4"], None, length) for length in (100, 5000, 9000, 9001)],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """LongBench's fields as they were published, short."""
    folder = tmp_path_factory.mktemp("long_bench")
    for name, rows in ROWS.items():
        names = ("context", "input", "answers", "all_classes", "length")
        lines = [
            json.dumps(dict(zip(names, row, strict=True)) | {"dataset": name, "_id": str(i)})
            for i, row in enumerate(rows)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def manager():
    return long_bench_manager()


def run(model, data_dir, *flags):
    return invoke(run_long_bench, "--model_name_or_path", model, "--data_dir", data_dir, "--device", "cpu", *flags)


def predictions(folder):
    return {path.name: path.read_text() for path in Path(folder).rglob("*.jsonl")}


def test_all_data_sets_are_known_by_name(manager):
    names = task_names(manager)
    assert len([name for name in names if not name.endswith("_e")]) == 21
    assert len([name for name in names if name.endswith("_e")]) == 13
    assert set(DEFAULT_TASKS) < set(names)


def test_a_run_writes_scores_answers_and_a_plot(demo_checkpoint, data_dir, tmp_path, capsys):
    flags = ("--datasets", "qasper,triviaqa,passage_count_e", "--limit", 3, "--max_length", 60, "--baseline", BASE)
    assert run(demo_checkpoint, data_dir, *flags, "--results", tmp_path / "r.json", "--dtype", "float32") == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    mine = [row for row in rows if row["model"] == "checkpoint"]
    assert [(row["task"], row["lengths"], row["rows"]) for row in mine] == [
        ("qasper", "all", 3),
        ("triviaqa", "all", 3),
        ("passage_count_e", "all", 3),
        ("passage_count_e", "0-4k", 1),
        ("passage_count_e", "4-8k", 1),
        ("passage_count_e", "8k+", 1),
    ]
    assert {row["cut"] for row in mine if row["task"] == "qasper"} == {3}
    by_length = {row["lengths"]: row["value"] for row in mine if row["task"] == "passage_count_e"}
    assert by_length["all"] == pytest.approx(sum(by_length[key] for key in ("0-4k", "4-8k", "8k+")) / 3)
    assert {row["kv_bytes_per_token"] for row in mine} == {5 * 2 * 256 * 4 / 2 + 4}
    assert (tmp_path / "r.png").is_file()
    assert "average of 3" in capsys.readouterr().out
    for row in mine:
        entries = [json.loads(line) for line in Path(row["answers"]).read_text().splitlines()]
        assert [entry["row"] for entry in entries] == [0, 1, 2]
        assert all("\n" not in entry["prediction"] for entry in entries) or row["task"] != "triviaqa"


def test_a_rerun_makes_nothing_anew_and_more_rows_go_on(demo_checkpoint, data_dir, monkeypatch):
    assert run(demo_checkpoint, data_dir, "--datasets", "triviaqa", "--limit", 2) == 0
    first = predictions("results/long_bench")
    from palu.evaluate import long_bench

    made = []
    original = long_bench.answer
    monkeypatch.setattr(long_bench, "answer", lambda *args: made.append(1) or original(*args))
    assert run(demo_checkpoint, data_dir, "--datasets", "triviaqa", "--limit", 2) == 0
    assert not made
    assert run(demo_checkpoint, data_dir, "--datasets", "triviaqa") == 0
    assert len(made) == 1
    later = predictions("results/long_bench")
    assert all(later[name].startswith(text) for name, text in first.items())
    assert run(demo_checkpoint, data_dir, "--datasets", "triviaqa", "--lt_bits", 4) == 0
    assert len(made) == 4
    assert run(demo_checkpoint, data_dir, "--datasets", "triviaqa", "--restart") == 0
    assert len(made) == 7
    copy = Path(shutil.copytree(demo_checkpoint, "checkpoint"))
    settings = json.loads((copy / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages[0].content }}"}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run(copy, data_dir, "--datasets", "triviaqa") == 0
    assert len(made) == 10


def test_killed_in_the_middle_and_resumed_gives_what_an_undisturbed_run_gives(demo_checkpoint, data_dir, tmp_path):
    flags = ["--datasets", "qasper,triviaqa,lcc", "--max_length", "300", "--device", "cpu"]
    assert (
        run(
            demo_checkpoint,
            data_dir,
            *flags[:4],
            "--output_dir",
            tmp_path / "whole",
            "--results",
            tmp_path / "whole.json",
        )
        == 0
    )
    command = [sys.executable, str(ROOT / "run_long_bench.py"), "--model_name_or_path", str(demo_checkpoint)]
    command += ["--data_dir", str(data_dir), *flags, "--output_dir", str(tmp_path / "cut")]
    command += ["--results", str(tmp_path / "cut.json")]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=threads, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(predictions(tmp_path / "cut").values()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (log,) = (path for path in (tmp_path / "cut").rglob("*.jsonl") if path.read_text())
    assert 1 <= len(log.read_text().splitlines()) < 3, "killed too late to test anything"
    with log.open("a") as file:
        file.write('{"row": 1, "predic')
    done = subprocess.run(command, env=threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert predictions(tmp_path / "cut") == predictions(tmp_path / "whole")
    scores = [
        [(row["task"], row["value"]) for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]]
        for name in ("whole", "cut")
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("damage", ['{"row": 2, "pre', '{"row": 2}\n', "\x00\x00\x00", '{"row": 2, "prediction": "x"}'])
def test_damaged_lines_are_cut_off(tmp_path, damage):
    log = PredictionLog(tmp_path / "a" / "log.jsonl")
    log.append(0, {"prediction": "one\u2028line"})
    log.append(1, {"prediction": "zwei Wörter"})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + damage.encode())
    again = PredictionLog(log.path)
    assert log.path.read_bytes() == whole
    assert {row: entry["prediction"] for row, entry in again.made.items()} == {0: "one\u2028line", 1: "zwei Wörter"}
    again.append(2, {"prediction": "drei"})
    assert set(PredictionLog(log.path).made) == {0, 1, 2}


def test_prompts_are_cut_in_the_middle(demo_tokenizer):
    prompt = STORY * 20 + "The end"
    ids = demo_tokenizer(prompt)["input_ids"]
    for limit in (50, 51):
        cut, length = prompt_tokens(demo_tokenizer, prompt, False, limit)
        assert (cut[:25], cut[25:], length) == (ids[:25], ids[25 - limit :], len(ids))
    assert prompt_tokens(demo_tokenizer, prompt, False, len(ids)) == (ids, len(ids))


def test_chat_templates_go_where_the_benchmark_wants_them(manager, data_dir, demo_tokenizer, monkeypatch):
    plain = {name: load_task(manager, name, data_dir).plain for name in ROWS}
    assert plain == {"qasper": False, "triviaqa": True, "trec": True, "lcc": True, "passage_count_e": False}
    monkeypatch.setattr(demo_tokenizer, "chat_template", "{% for m in messages %}[{{ m.content }}]{% endfor %}>")
    ids, _ = prompt_tokens(demo_tokenizer, "Who?", True, 100)
    assert demo_tokenizer.decode(ids) == demo_tokenizer.decode(
        demo_tokenizer("[Who?]>", add_special_tokens=False)["input_ids"]
    )


def test_scores_are_those_of_the_benchmark(manager, data_dir):
    task = load_task(manager, "trec", data_dir)
    assert mean_scores(task, {0: "Human being"}) == {"all": (100.0, [0])}
    assert mean_scores(task, {0: "Human being or Place"}) == {"all": (50.0, [0])}
    task = load_task(manager, "qasper", data_dir)
    assert mean_scores(task, {0: "A boat", 1: "", 2: "the boat, a dog, and lamp"})["all"].score == pytest.approx(
        100 * (2 * (1 * 1 / 4) / (1 + 1 / 4) + 0 + 1) / 3
    )
    assert task.stops == []
    assert load_task(manager, "triviaqa", data_dir).stops == ["\n"]


def test_prompts_are_lm_evals(manager, data_dir):
    task = load_task(manager, "qasper", data_dir)
    prompt = task.prompt(task.rows[1])
    assert prompt.startswith("You are given a scientific article and a question.")
    assert prompt.endswith("Question: What did he have, 1?\n\nAnswer:")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--datasets", "qasp"), "'qasp' is no data set of LongBench; use all or 2wikimqa"),
        (("--datasets", "musique"), "musique.jsonl does not exist; data sets in that directory: lcc, passage_count_e"),
        (("--datasets", "lcc", "--max_length", "0"), "--max_length 0 must be at least 1"),
        (("--datasets", "lcc", "--max_length", "99999"), "--max_length 99999 exceeds its 2048 positions"),
        (("--datasets", "lcc", "--chat_template"), "its tokenizer has no chat template"),
        (("--datasets", "lcc", "--flash2"), "--flash2 needs a GPU and the package flash-attn"),
        (("--data_dir", "nowhere"), "--data_dir nowhere is not a directory"),
    ],
)
def test_bad_flags_are_refused_in_one_line(demo_checkpoint, data_dir, flags, message, capsys):
    assert run(demo_checkpoint, data_dir, *flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: no object with fields"),
        ('{"context": "a", "input": "b", "answers": [1]}', "line 2: no 'answers'"),
        ('{"context": 1, "input": "b", "answers": ["a"]}', "line 2: no 'context'"),
        ('{"context": "a", "answers": []}', "line 2: no 'question'"),
        ('{"context": "a", "input": "b"}', "line 2: no 'answers'"),
    ],
)
def test_damaged_rows_are_named(tmp_path, line, message):
    good = json.dumps({"context": "a\u2028b", "input": "", "answers": "x"}, ensure_ascii=False)
    (tmp_path / "lcc.jsonl").write_text(f"{good}\n\n")
    assert read_rows(tmp_path / "lcc.jsonl")[0]["answers"] == ["x"]
    (tmp_path / "qasper.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(PaluError, match=message):
        read_rows(tmp_path / "qasper.jsonl")


def test_answers_without_the_number_that_the_metric_reads_are_refused(tmp_path):
    rows = [{"context": "a", "input": "b", "answers": [answer]} for answer in ("Paragraph 3", "3")]
    (tmp_path / "passage_retrieval_en.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(PaluError, match="line 2: an answer without a number behind 'Paragraph '"):
        read_rows(tmp_path / "passage_retrieval_en.jsonl")


@pytest.mark.parametrize(("name", "field"), [("trec", "all_classes"), ("qasper_e", "length")])
def test_rows_without_what_their_scores_need_are_refused(tmp_path, name, field):
    row = {"context": "a", "input": "b", "answers": ["x"]}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(PaluError, match=f"line 1: no '{field}'"):
        read_rows(tmp_path / f"{name}.jsonl")
