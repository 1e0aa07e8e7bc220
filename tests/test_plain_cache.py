"""The plain-quantised peer: a stock model's full keys and values as codes."""

import pytest
import torch
from transformers import GPT2Config

import run_ppl_eval
from palu.calibrate.text import DEMO_ASSETS
from palu.core.errors import PaluError
from palu.nn.plain_cache import CHANNEL_BLOCK, PlainQuantizedCache
from tests.helpers import FAMILIES, invoke, left_padded_batch, random_windows, tiny_model
from utils.results import read_results


def rounded(states, bits, axis):
    """Asymmetric rounding to `2 ** bits` levels between minimum and maximum along an axis, scales and zeros in fp16."""
    low, high = states.amin(axis, keepdim=True), states.amax(axis, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).half().float()
    return scale * ((states / scale + zero).round().clamp(0, 2**bits - 1) - zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("key_axis", ["token", "channel"])
def test_update_returns_every_token_with_its_rounding(bits, key_axis):
    model = tiny_model("llama")
    cache = PlainQuantizedCache(model.config, bits, key_axis)
    keys, values = torch.randn(2, 3, 4, 77, 16), torch.randn(2, 3, 4, 77, 16)
    start = 0
    while start < 77:
        stop = min(77, start + int(torch.randint(1, 40, ())))
        for layer in (0, 1):
            got = cache.update(keys[layer, :, :, start:stop], values[layer, :, :, start:stop], layer)
        start = stop
    expected = rounded(keys[1], bits, -1)
    if key_axis == "channel":
        whole = 77 // CHANNEL_BLOCK * CHANNEL_BLOCK
        blocks = keys[1][:, :, :whole].unflatten(2, (-1, CHANNEL_BLOCK))
        expected = torch.cat([rounded(blocks, bits, 3).flatten(2, 3), keys[1][:, :, whole:]], dim=2)
    assert torch.allclose(got[0], expected, atol=1e-5)
    assert torch.allclose(got[1], rounded(values[1], bits, -1), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("key_axis", ["token", "channel"])
def test_chunks_padding_and_windows_do_not_change_what_is_seen(family, key_axis):
    model = tiny_model(family).double()
    batch = left_padded_batch(model, 50)
    expected = model(**batch).logits[:, -1]
    for bits, close in ((8, 0.05), (2, 5.0)):
        cache = PlainQuantizedCache(model.config, bits, key_axis)
        for part in batch["input_ids"].split([31, 2, 17], dim=1):
            length = cache.get_seq_length() + part.shape[1]
            mask = batch["attention_mask"][:, :length]
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -part.shape[1] :]
            logits = model(part, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        error = (logits[:, -1] - expected).abs().max() / expected.abs().max()
        assert 0 < error < close


@torch.no_grad()
def test_bytes_are_those_of_codes_scales_and_zero_points():
    model = tiny_model("llama").to(torch.bfloat16)
    for bits in (2, 3, 4, 8):
        cache = PlainQuantizedCache(model.config, bits)
        model(random_windows(model, 2, 40), past_key_values=cache)
        assert cache.bytes_per_token() == 3 * 2 * 4 * (16 * bits / 8 + 4)
    cache = PlainQuantizedCache(model.config, 4, "channel")
    model(random_windows(model, 2, 40), past_key_values=cache)
    keys = 64 * (32 * 4 / 8 + 4) + 8 * 64 * 2
    assert cache.nbytes() == 2 * 3 * (keys + 40 * 4 * (16 * 4 / 8 + 4))


def test_rows_of_the_peer_stand_beside_the_models(demo_checkpoint, tmp_path, capsys):
    options = ["--datasets", "demo", "--seqlen", 96, "--max_windows", 2, "--results", tmp_path / "r.json"]
    models = ["--model_name_or_path", demo_checkpoint, "--baseline", DEMO_ASSETS / "model"]
    assert invoke(run_ppl_eval, *models, *options, "--plain_bits", "8,2", "--plain_key_axis", "channel") == 0
    rows = read_results(tmp_path / "r.json")["rows"]
    assert [(row["plain"], row["bits"]) for row in rows] == [(None, 16), (None, 16), ("channel", 8), ("channel", 2)]
    assert rows[1]["perplexity"] == pytest.approx(rows[2]["perplexity"], rel=0.02)
    assert rows[3]["perplexity"] != pytest.approx(rows[1]["perplexity"], rel=1e-3)
    assert rows[3]["kv_bytes_per_token"] < rows[2]["kv_bytes_per_token"] < rows[1]["kv_bytes_per_token"]
    assert "plain, keys per channel" in " ".join(capsys.readouterr().out.split())


def test_what_the_peer_cannot_do_is_refused(demo_checkpoint, capsys):
    options = ["--datasets", "demo", "--seqlen", 64, "--max_windows", 1]
    for model, flags, message in (
        (demo_checkpoint, ["--plain_bits", "4"], "pass the original model as --baseline"),
        (DEMO_ASSETS / "model", ["--plain_bits", "5"], "plain bits 5 must be one of 2, 3, 4, 8"),
        (DEMO_ASSETS / "model", ["--plain_bits", "four"], "must be numbers such as 8,4,2"),
        (DEMO_ASSETS / "model", ["--plain_bits", ","], "must be numbers such as 8,4,2"),
        (DEMO_ASSETS / "model", ["--plain_bits", "4", "--plain_key_axis", "row"], "choose from"),
        (DEMO_ASSETS / "model", ["--plain_key_axis", "channel"], "does nothing without --plain_bits"),
    ):
        assert invoke(run_ppl_eval, "--model_name_or_path", model, *options, *flags) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(PaluError, match="'gpt2' models are not supported"):
        PlainQuantizedCache(GPT2Config(), 4)
    cache = PlainQuantizedCache(tiny_model("llama").config, 4, "channel")
    cache.update(torch.randn(1, 4, 40, 16), torch.randn(1, 4, 40, 16), 0)
    with pytest.raises(PaluError, match="cannot be cropped into a whole block"):
        cache.layers[0].crop(-20)
