"""Comparing methods: a row for every way of caching, a plot, one line for bad input."""

from pathlib import Path

import pytest
import torch

import compress
import run_ppl_eval
from palu.evaluate.perplexity import perplexity
from tests.helpers import compressed, example, in_an_empty_folder, invoke, random_windows, tiny_model  # noqa: F401
from utils import report
from utils.results import read_results

compare_methods = example("compare_methods")

SMALL = ["--max_windows", "2", "--seqlen", "128", "--n_whiten_calib_samples", "2", "--calib_seqlen", "64"]
SMALL += ["--n_fisher_calib_samples", "1"]


def compare(*argv):
    return invoke(compare_methods, *SMALL, "--results", "out.json", *argv)


def test_every_way_of_caching_is_measured_and_drawn(capsys):
    methods = "fisher_uniform+whiten,uniform+attention"
    assert compare("--methods", methods, "--ratios", "0.3,0.5", "--lt_bits", "16,4", "--plain_bits", "4,2") == 0
    rows = read_results(Path("out.json"))["rows"]
    latent = [row for row in rows if row["method"] is not None]
    assert {(row["method"], row["bits"]) for row in latent} == {(m, b) for m in methods.split(",") for b in (16, 4)}
    assert len(latent) == 8
    assert [row["bits"] for row in rows if row["plain"]] == [4, 2]
    full = next(row for row in rows if row["method"] is None and not row["plain"])
    for row in latent:
        numbers = row["kept_ratio"] * row["bits"] / 16
        # Positions, and codes' scales and zero points, come on top.
        assert numbers < row["kv_bytes_per_token"] / full["kv_bytes_per_token"] < 1.2 * numbers
    assert Path("out.png").stat().st_size > 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("Perplexity on demo", "KL", "original"))


def test_the_plot_counts_numbers_of_32_bits_as_16(monkeypatch):
    def row(method, nbytes, bits, plain=None):
        counted = {"kv_bytes_per_token": nbytes, "bits": bits, "value_bits": bits, "plain": plain, "hadamard": False}
        return counted | {"method": method, "dataset": "text", "perplexity": 1 + 1 / nbytes, "divergence": 1 / nbytes}

    rows = [row("uniform+svd", 400, 32), row("uniform+svd", 25, 4), row(None, 50, 4, "token"), row(None, 800, 32)]
    rows += [row("global_bits+fisher", 70, 5.5), row("global_bits+fisher", 90, 7.2)]
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    report.plot_front({"rows": rows}, Path("front.png"))
    (above, _), (legend,) = figures[0].axes, figures[0].legends
    drawn = {line.get_label(): list(line.get_xdata()) for line in above.get_lines()[:-1]}
    assert drawn == {
        "uniform+svd": [0.5],
        "uniform+svd, 4 bits": [0.0625],
        "plain quantisation, keys per token": [0.125],
        "global_bits+fisher": [0.175, 0.225],
    }
    assert {text.get_text() for text in legend.get_texts()} == set(drawn)


def test_flags_of_the_rank_search_reach_every_method_that_has_them():
    asked = ["--methods", "global+fisher,global+svd,fisher_uniform+whiten,", "--key_cost", "2", "--max_key_rank", "64"]
    configs = compare_methods.compression_configs(compare_methods.parse(asked)).values()
    assert len(configs) == 9
    costs = {config.search_method: (config.key_cost, config.max_key_rank) for config in configs}
    assert costs == {"global": (2, 64), "fisher_uniform": (1, 64)}


def test_what_a_method_does_not_take_is_said_with_its_name(capsys):
    assert compare("--methods", "uniform+fisher,uniform+nothing", "--ratios", "0.5") == 2
    assert "uniform+nothing" in capsys.readouterr().err
    assert compare("--methods", "uniform+fisher,global+fisher", "--ratios", "0.01", "--plain_bits", "8") == 2
    assert "'uniform+fisher': param_ratio_target 0.01 leaves" in capsys.readouterr().err
    assert compare("--methods", ",") == 2


def test_a_cost_of_keys_that_no_method_takes_is_refused(capsys):
    assert compare("--methods", "uniform+fisher", "--ratios", "0.5", "--key_cost", "2") == 2
    assert "key_cost 2.0 is for the search_method global" in capsys.readouterr().err


def test_a_row_is_what_compressing_and_measuring_one_by_one_gives():
    assert compare("--methods", "uniform+fisher+sequential", "--ratios", "0.5", "--plain_bits", "8") == 0
    together = read_results(Path("out.json"))["rows"][0]
    small = [*SMALL[4:], "--search_method", "uniform", "--output_dir", "one", "--results", "one.json"]
    assert invoke(compress, *small) == 0
    ask = ["--model_name_or_path", "one", "--datasets", "demo", *SMALL[:4], "--results", "ppl.json"]
    assert invoke(run_ppl_eval, *ask) == 0
    apart = read_results(Path("ppl.json"))["rows"][0]
    assert together["perplexity"] == pytest.approx(apart["perplexity"], rel=1e-5)
    assert together["kv_bytes_per_token"] == apart["kv_bytes_per_token"]


def test_a_method_may_be_sequential():
    more = ["--n_whiten_calib_samples", "16", "--calib_seqlen", "512", "--ratios", "0.3", "--plain_bits", "8"]
    assert compare("--methods", "uniform+whiten+sequential,uniform+whiten", *more) == 0
    fitted, plain = (row["divergence"] for row in read_results(Path("out.json"))["rows"][:2])
    assert fitted < plain


def test_a_text_too_short_to_refit_on_is_refused_before_anything_is_compressed(capsys):
    Path("one.txt").write_text("It was a dark night, and a long one. " * 8)
    assert compare("--calib_dataset", "one.txt", "--methods", "uniform+whiten,uniform+whiten+sequential") == 2
    told, refused = capsys.readouterr().err.strip().splitlines()
    assert "1 windows of 64 tokens, 2 were asked for" in told
    assert refused.startswith("error: sequential needs two or more calibration windows, the text holds one")
    assert not Path("out.json").exists()


def test_a_method_may_be_adapted_to_the_calibration_text():
    methods = "uniform+whiten+sequential,uniform+whiten+sequential+adapt=0.5"
    assert compare("--methods", methods, "--ratios", "0.5", "--plain_bits", "8", "--n_whiten_calib_samples", "8") == 0
    plain, adapted = (row["divergence"] for row in read_results(Path("out.json"))["rows"][:2])
    assert plain != adapted


def test_a_method_may_have_a_value_group_size_of_its_own():
    few = ["--ratios", "0.5", "--plain_bits", "8", "--value_group_size"]
    assert compare("--methods", "uniform+svd+2,uniform+svd", *few, "1") == 0
    own, ones = (row["perplexity"] for row in read_results(Path("out.json"))["rows"][:2])
    assert compare("--methods", "uniform+svd", *few, "2") == 0
    assert own == read_results(Path("out.json"))["rows"][0]["perplexity"] != ones


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, None), (3, 7)])
def test_divergence_is_that_of_the_predictions_from_the_originals(batch_size, chunk):
    model = tiny_model("qwen3")
    latent, windows = compressed(model, 0.5).model, random_windows(model, 3, 30)
    with torch.no_grad():
        expected, found = (torch.log_softmax(each(windows).logits.double(), -1) for each in (model, latent))
    nats = (expected.exp() * (expected - found)).sum(-1).mean().item()
    measured = perplexity(latent, windows, batch_size, chunk=chunk, reference=model)
    assert measured.divergence == pytest.approx(nats, rel=1e-3)
    assert perplexity(model, windows, reference=model).divergence == pytest.approx(0.0, abs=1e-7)
    assert perplexity(latent, windows).divergence is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "fisher"], "must be SEARCH+DECOMPOSITION"),
        (["--methods", "uniform+svd+all+1"], "'uniform+svd+all+1' has two value_group_size"),
        (["--methods", "uniform+svd+some"], "'uniform+svd+some': 'some' is neither"),
        (["--methods", "uniform+svd+adapt"], "'uniform+svd+adapt': 'adapt' needs a share, as in adapt=0.1"),
        (["--methods", "uniform+svd+adapt=0+adapt=0.1"], "has two adapt"),
        (["--methods", "uniform+svd+adapt=2"], "adapt 2.0 must be a share from 0"),
        (["--methods", "best+whiten"], "search_method 'best' is unknown"),
        (["--ratios", "0.3,2"], "param_ratio_target 2.0"),
        (["--lt_bits", "5"], "bits 5 must be one of"),
        (["--plain_bits", "16"], "plain bits 16 must be one of 2, 3, 4, 8"),
        (["--seqlen", "100000"], "--seqlen 100000 must lie in"),
        (["--calib_dataset", "nowhere.txt", "--methods", "uniform+svd,uniform+whiten"], "nowhere.txt"),
        (["--datasets", " , "], "--datasets must name a text"),
        (["--max_windows", "0"], "--max_windows 0 must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line_and_code_2(argv, message, capsys):
    assert compare(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("out.json").exists()
