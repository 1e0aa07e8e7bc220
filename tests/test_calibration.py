"""Statistics against their definitions, text from every source, the cache on disk."""

import json
import logging

import pytest
import torch

import palu
from palu.calibrate.fisher import fisher_information
from palu.calibrate.moments import stream_moments
from palu.calibrate.sites import projection
from palu.calibrate.store import StatisticsStore, weights_fingerprint
from palu.calibrate.text import load_text
from palu.calibrate.windows import CalibrationWindows, sample_windows, tokenize
from palu.core.errors import PaluError
from tests.helpers import FAMILIES, compressed, random_windows, tiny_model


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_streamed_grams_equal_those_of_a_whole_forward(family, attention):
    model = tiny_model(family, attention=attention)
    windows = random_windows(model, 3, 40)
    expected = []
    for layer in model.model.layers:
        inputs = []
        handle = layer.self_attn.k_proj.register_forward_pre_hook(lambda m, args, kept=inputs: kept.append(args[0]))
        with torch.no_grad():
            for window in windows:
                model(window[None])
        handle.remove()
        stacked = torch.cat(inputs).reshape(-1, 64).double()
        expected.append(stacked.T @ stacked / len(stacked))
    got = [moments.gram for moments in stream_moments(model, windows)]
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fisher_information_equals_autograd_with_one_label_shift(family):
    model = tiny_model(family)
    windows = random_windows(model, 3, 20)
    squared = {}
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        for layer in range(3):
            for side in ("key", "value"):
                gradient = projection(model, layer, side).weight.grad.double()
                squared[layer, side] = squared.get((layer, side), 0) + gradient.square() / len(windows)
    model.zero_grad()
    scores = fisher_information(model, windows)
    for (layer, side), mean_square in squared.items():
        expected = mean_square.sqrt().view(4, -1).mean(dim=1)
        assert torch.allclose(scores[side][layer], expected, rtol=1e-3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_nan_is_refused_by_name(what):
    model = tiny_model("llama")
    with torch.no_grad():
        if what == "weights":
            model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
        else:
            # Finite, but its square overflows float32 inside the norm of the layer after it.
            model.model.layers[1].mlp.down_proj.weight.mul_(1e38)
    expected = "layers.1.self_attn.o_proj.weight" if what == "weights" else "activations of layer 2"
    with pytest.raises(PaluError, match=expected):
        compressed(model, 0.5, decompose_method="whiten")


def test_fewer_tokens_than_hidden_size_still_compress():
    model = tiny_model("llama")
    windows = CalibrationWindows(random_windows(model, 1, 20), None)
    methods = {"search_method": "uniform", "decompose_method": "whiten", "sequential": False}
    config = palu.CompressionConfig(0.5, 2, rank_multiple=4, **methods)
    latent = palu.compress(model, config=config, windows=windows).model
    ids = windows.moments
    with torch.no_grad():
        full, low = model(ids).logits, latent(ids).logits
    # Half of 32 dimensions holds all 20 tokens nearly: on these very tokens little is lost.
    assert torch.isfinite(low).all()
    assert (full - low).norm() < 0.5 * full.norm()


def test_whitening_beats_plain_svd_on_the_demo_model(demo_model, demo_tokenizer):
    from palu.calibrate.windows import consecutive_windows
    from palu.evaluate.perplexity import perplexity

    options = {"n_whiten_calib_samples": 16, "calib_seqlen": 256, "calib_dataset": "demo", "search_method": "uniform"}
    tokens = tokenize(demo_tokenizer, load_text("demo", "evaluation"), "demo", demo_model.config)
    windows = consecutive_windows(tokens, 256, "demo")[:12]
    original = perplexity(demo_model, windows).perplexity
    losses = {}
    for method in ("svd", "whiten"):
        config = palu.CompressionConfig(0.5, "all", decompose_method=method, **options)
        losses[method] = perplexity(palu.compress(demo_model, demo_tokenizer, config).model, windows).perplexity
    assert original < losses["whiten"] < 1.02 * original
    assert losses["svd"] - original > 3 * (losses["whiten"] - original)


def test_same_seed_same_windows_and_no_overlap(demo_tokenizer, demo_model):
    tokens = torch.arange(1000)
    first, again = (sample_windows(tokens, 5, 64, 3, "x") for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, sample_windows(tokens, 5, 64, 4, "x"))
    assert len(first.flatten().unique()) == 5 * 64


def test_too_few_windows_are_warned_about_and_none_is_an_error(caplog):
    with caplog.at_level(logging.WARNING):
        assert len(sample_windows(torch.arange(200), 5, 64, 0, "short.txt")) == 3
    assert "short.txt holds 3 windows of 64 tokens, 5 were asked for" in caplog.text
    with pytest.raises(PaluError, match=r"short.txt: 63 tokens are too few"):
        sample_windows(torch.arange(63), 5, 64, 0, "short.txt")


def write_sources(folder):
    from pyarrow import Table, parquet

    rows = [{"text": "Ein erster Satz."}, {"text": "Zweiter Satz ü."}]
    (folder / "a.txt").write_text("plain text", encoding="utf-8")
    (folder / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    instruction = [{"instruction": "Add", "input": "1 and 2", "output": "3"}]
    (folder / "c.json").write_text(json.dumps(instruction), encoding="utf-8")
    parquet.write_table(Table.from_pylist(rows), folder / "d.parquet")
    return {
        "a.txt": "plain text",
        "b.jsonl": "Ein erster Satz.\n\nZweiter Satz ü.",
        "c.json": "Add\n1 and 2\n3",
        "d.parquet": "Ein erster Satz.\n\nZweiter Satz ü.",
    }


def test_text_is_read_from_every_kind_of_file_and_from_a_directory(tmp_path):
    expected = write_sources(tmp_path)
    for name, text in expected.items():
        assert load_text(str(tmp_path / name), "calibration") == text
    assert load_text(str(tmp_path), "calibration") == "\n\n".join(expected.values())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", None, "no .txt, .raw"),
        ("bad.jsonl", b'{"text": "a"}\n{"te', "bad.jsonl: cannot be read as .jsonl"),
        ("bad.parquet", b"PAR1 no", "bad.parquet: cannot be read as parquet"),
        ("bad.txt", b"\xff\xfe\x00", "bad.txt: cannot be read as .txt"),
        ("x.csv", b"a,b", "x.csv: text of type .csv is not known; use .txt, .raw"),
        ("null.jsonl", b'{"text": null}', "a row's 'text' is None, not text"),
        ("deep.json", b"[" * 100_000, "deep.json: cannot be read as .json"),
        ("other.jsonl", b'{"label": 3, "score": 1}', "no text column among label, score"),
    ],
)
def test_unreadable_text_is_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(PaluError, match=message):
        load_text(str(path), "calibration")


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "alpaca"])
def test_hub_data_offline_names_the_file_option(name):
    with pytest.raises(
        PaluError, match=f"data set '{name}' cannot be loaded.*give a .txt, .jsonl, .json or .parquet file"
    ):
        load_text(name, "calibration")


def test_an_unknown_data_set_lists_the_known_ones():
    with pytest.raises(PaluError, match="demo, wikitext2, c4, ptb, alpaca"):
        load_text("no-such-thing", "calibration")


def test_empty_text_is_refused(demo_tokenizer, demo_model):
    with pytest.raises(PaluError, match="empty"):
        tokenize(demo_tokenizer, " \n", "x.txt", demo_model.config)


def compress_windows(model, windows):
    return palu.compress(model, config=palu.CompressionConfig(), windows=CalibrationWindows(windows, windows))


def count_forwards(model, **options):
    """Compress and count calls of the last layer."""
    calls = []
    handle = model.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    windows = options.pop("windows", random_windows(model, 2, 24))
    # Refitting reads the windows again, whatever is kept.
    config = palu.CompressionConfig(0.5, 2, rank_multiple=4, sequential=False)
    result = palu.compress(model, config=config, windows=CalibrationWindows(windows, windows), **options)
    handle.remove()
    return len(calls), result


def test_cached_statistics_are_reused_and_give_the_same_model(tmp_path):
    model = tiny_model("llama")
    first_calls, first = count_forwards(model, cache_dir=tmp_path)
    again_calls, again = count_forwards(model, cache_dir=tmp_path)
    assert first_calls > 0
    assert again_calls == 0
    assert first.plan == again.plan
    state, expected = again.model.state_dict(), first.model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_cache_is_keyed_by_weights_and_tokens(tmp_path):
    model = tiny_model("llama")
    count_forwards(model, cache_dir=tmp_path)
    assert count_forwards(model, cache_dir=tmp_path, windows=random_windows(model, 2, 24, seed=9))[0] > 0
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5, 7] += 1e-3
    assert weights_fingerprint(model) != before
    assert count_forwards(model, cache_dir=tmp_path)[0] > 0


def test_the_cache_is_keyed_by_the_whole_config(tmp_path):
    windows = random_windows(tiny_model("qwen2"), 2, 24)
    changes = [
        {},
        {"hidden_act": "gelu"},
        {"max_window_layers": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 2},
    ]
    keys = {StatisticsStore(tmp_path, "moments", tiny_model("qwen2", **change), windows).key for change in changes}
    assert len(keys) == len(changes)
    again = tiny_model("qwen2")
    again.config._name_or_path = "elsewhere"
    assert StatisticsStore(tmp_path, "moments", again, windows).key in keys


def test_a_model_in_training_mode_is_compressed_as_in_evaluation_and_left_as_it_was():
    model = tiny_model("llama", attention_dropout=0.5)
    expected = compressed(model, 0.5, decompose_method="whiten", search_method="fisher").model.state_dict()
    got = compressed(model.train(), 0.5, decompose_method="whiten", search_method="fisher").model.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert model.training


def test_streaming_leaves_the_callers_gradient_mode_alone():
    model = tiny_model("llama")
    for _ in stream_moments(model, random_windows(model, 1, 8)):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: palu.compress(m, config=palu.CompressionConfig(calib_seqlen=64)), "a tokenizer .* is needed"),
        (lambda m: CalibrationWindows(torch.zeros(5, dtype=torch.int64), None), "moments windows must be int64"),
        (lambda m: CalibrationWindows(None, torch.zeros(2, 3)), "fisher windows must"),
        (lambda m: compress_windows(m, torch.full((1, 9), 10**6)), "token id 1000000 is there, the model has 101"),
        (lambda m: palu.CompressionConfig("0.5"), "must lie in"),
        (lambda m: palu.CompressionConfig(rank_multiple=1.5), "rank_multiple 1.5 must be"),
        (lambda m: palu.CompressionConfig(head_group_size=None), "head_group_size None must be"),
        (lambda m: palu.CompressionConfig(seed="a"), "seed 'a' must be"),
    ],
)
def test_wrong_arguments_of_the_library_are_clear(call, message):
    with pytest.raises(PaluError, match=message):
        call(tiny_model("llama"))


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "stale"])
def test_a_damaged_cache_is_computed_again_with_a_warning(tmp_path, caplog, damage):
    model = tiny_model("llama")
    _, expected = count_forwards(model, cache_dir=tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-9])
        elif damage == "overwritten":
            path.write_bytes(path.read_bytes()[:-40] + b"\xff" * 40)
        else:
            store = StatisticsStore(tmp_path, "moments", model, random_windows(model, 1, 8))
            store.write("x", {"tensor": torch.zeros(2)})
            path.write_bytes((store.directory / "x.safetensors").read_bytes())
    with caplog.at_level(logging.WARNING):
        calls, got = count_forwards(model, cache_dir=tmp_path)
    assert calls > 0
    assert got.plan == expected.plan
    assert ("belongs to other inputs" if damage == "stale" else "is damaged") in caplog.text
