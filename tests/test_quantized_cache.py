"""Latents in the live cache as packed codes: bytes, independence of the way they came in, every way of generating."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
import palu
import run_ppl_eval
from palu.calibrate.text import DEMO_ASSETS
from palu.core.errors import PaluError
from palu.nn.latent_cache import LatentCache
from palu.nn.plain_cache import PlainQuantizedCache
from tests.helpers import FAMILIES, compressed, invoke, left_padded_batch, random_windows, tiny_model
from utils.results import read_results


def quantized(family, bits=4, value_bits=None, **options):
    """A tiny compressed model whose cache holds codes; float64, so that rounding does not tip a code over."""
    latent = compressed(tiny_model(family), 0.75).model.double()
    palu.set_quantization(latent, palu.QuantizationConfig(bits, value_bits or bits, **options))
    return latent


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_results_do_not_depend_on_how_the_prompt_was_split(family):
    latent = quantized(family)
    ids = random_windows(latent, 2, 40)
    expected = latent(ids).logits
    cache = LatentCache(latent.config)
    parts = [latent(chunk, past_key_values=cache).logits for chunk in ids.split([13, 1, 17, 3, 6], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_fixed_capacity_and_left_padding_give_the_same_tokens_as_the_growing_cache(family):
    latent = quantized(family, 8, 4)
    batch = left_padded_batch(latent)
    expected = latent.generate(**batch, max_new_tokens=24, do_sample=False)
    got = latent.generate(**batch, max_new_tokens=24, do_sample=False, cache_implementation="static")
    alone = latent.generate(batch["input_ids"][1:2, 3:], max_new_tokens=24, do_sample=False)
    assert torch.equal(expected, got)
    assert torch.equal(expected[1:2, 3:], alone)


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bytes_are_those_of_the_codes_scales_zero_points_and_positions(bits, symmetric):
    latent = quantized("llama", bits, symmetric=symmetric)
    cache = latent(random_windows(latent, 3, 40)).past_key_values
    per_token = 4
    for layer in latent.config.latent.layers:
        for ranks in (layer.key, layer.value):
            per_token += -(-sum(ranks) * bits // 8) + len(ranks) * (2 if symmetric else 4)
    assert cache.bytes_per_token() == per_token
    assert cache.nbytes() == cache.allocated_nbytes() == 3 * 40 * per_token


def test_training_does_not_go_through_codes():
    latent = compressed(tiny_model("llama"), 0.75, value_group_size=1).model.train()
    ids = random_windows(latent, 2, 30)
    gradients = []
    for settings in (palu.QuantizationConfig(), palu.QuantizationConfig(2, 2)):
        palu.set_quantization(latent, settings)
        latent.zero_grad()
        latent(ids, labels=ids).loss.backward()
        gradients.append(latent.model.layers[0].self_attn.v_proj.down.weight.grad.clone())
    assert torch.equal(*gradients)


def test_codes_made_in_inference_mode_leave_later_gradients_alone():
    latent = quantized("llama", 4, clip_ratio=0.85)
    ids = random_windows(latent, 1, 12)
    with torch.inference_mode():
        latent.generate(ids, max_new_tokens=2)
    latent(ids, labels=ids, past_key_values=LatentCache(latent.config)).loss.backward()
    assert latent.lm_head.weight.grad.isfinite().all()


def test_a_cache_of_plain_codes_is_refused():
    latent = quantized("llama")
    cache = PlainQuantizedCache(tiny_model("llama").config, 4)
    with pytest.raises(PaluError, match="cannot use PlainQuantizedCache"):
        latent(random_windows(latent, 1, 4), past_key_values=cache)


@torch.no_grad()
def test_more_bits_and_smaller_groups_lose_less():
    latent = compressed(tiny_model("llama"), 1.0).model
    ids = random_windows(latent, 2, 40)
    exact = latent(ids).logits
    errors = []
    for settings in ((2, 2), (3, 3), (4, 4), (4, 4, 8), (8, 8)):
        palu.set_quantization(latent, palu.QuantizationConfig(*settings))
        errors.append((latent(ids).logits - exact).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * exact.norm()


@torch.no_grad()
def test_beams_and_assisted_decoding_work_on_codes():
    latent = quantized("llama", 8)
    ids = random_windows(latent, 1, 20)
    expected = latent.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(expected, latent.generate(ids, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=3))
    beams = latent.generate(ids, max_new_tokens=10, do_sample=False, num_beams=3)
    assert beams.shape == (1, 30)


def test_the_setting_is_saved_with_the_model(tmp_path):
    latent = quantized("llama", 3, 4, group_size=8, symmetric=True, clip_ratio=0.9)
    latent.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.latent.quantization == palu.QuantizationConfig(3, 4, 8, True, 0.9)
    with torch.no_grad():
        cache = loaded(random_windows(loaded, 1, 5)).past_key_values
    assert cache.layers[0].key_buffer.quantization.bits == 3
    assert cache.layers[0].value_buffer.quantization.bits == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_bits": 5}, "lt_bits 5 must be one of 2, 3, 4, 8, 16"),
        ({"group_size": 0}, "lt_group_size 0 must be at least 1"),
        ({"clip_ratio": 0}, r"lt_clip_ratio 0 must lie in \(0, 1\]"),
    ],
)
def test_settings_that_do_not_exist_are_refused(options, message):
    with pytest.raises(PaluError, match=message):
        palu.QuantizationConfig(**options)


@pytest.mark.parametrize(
    ("argv", "bytes_per_token"),
    [
        ([], 2560 + 4),
        (["--lt_bits", 4], 640 + 10 * 4 + 4),
        (["--lt_bits", 4, "--lt_sym"], 640 + 10 * 2 + 4),
        (["--lt_bits", 3, "--lt_hadamard"], 480 + 10 * 4 + 4),
        (["--lt_bits", 4, "--lt_group_size", 32], 640 + 40 * 4 + 4),
        (["--lt_bits", 8, "--lt_value_bits", 8, "--lt_clip_ratio", 0.95], 1280 + 10 * 4 + 4),
    ],
    ids=str,
)
def test_the_perplexity_script_reads_the_packed_cache(demo_checkpoint, tmp_path, argv, bytes_per_token):
    options = ["--datasets", "demo", "--seqlen", 64, "--max_windows", 4, "--results", tmp_path / "r.json"]
    assert invoke(run_ppl_eval, "--model_name_or_path", demo_checkpoint, *options, *argv) == 0
    row = read_results(tmp_path / "r.json")["rows"][0]
    assert row["kv_bytes_per_token"] == bytes_per_token
    assert row["bits"] == (argv[1] if argv else 16)
    assert row["hadamard"] == ("--lt_hadamard" in argv)
    assert row["perplexity"] < 200


def test_a_checkpoint_beside_itself_shows_what_quantisation_costs(demo_checkpoint, tmp_path, capsys):
    options = ["--datasets", "demo", "--seqlen", 64, "--max_windows", 2, "--results", tmp_path / "r.json"]
    model = ["--model_name_or_path", demo_checkpoint, "--baseline", demo_checkpoint]
    assert invoke(run_ppl_eval, *model, *options, "--lt_bits", 2) == 0
    rows = read_results(tmp_path / "r.json")["rows"]
    assert [row["bits"] for row in rows] == [2, 16]
    assert len({row["model"] for row in rows}) == 2
    assert f"{rows[1]['perplexity']:.3f}" in capsys.readouterr().out


def test_latent_flags_are_refused_for_a_stock_model_and_for_values_that_do_not_exist(demo_checkpoint, capsys):
    options = ["--datasets", "demo", "--seqlen", 64, "--max_windows", 1]
    stock = DEMO_ASSETS / "model"
    assert invoke(run_ppl_eval, "--model_name_or_path", stock, *options, "--lt_bits", 4) == 2
    assert "is not a compressed model; --lt_bits needs one" in capsys.readouterr().err
    assert invoke(run_ppl_eval, "--model_name_or_path", stock, *options, "--lt_clip_ratio", 0) == 2
    assert "is not a compressed model; --lt_clip_ratio needs one" in capsys.readouterr().err
    assert invoke(run_ppl_eval, "--model_name_or_path", demo_checkpoint, *options, "--lt_bits", 5) == 2
    assert "lt_bits 5 must be one of 2, 3, 4, 8, 16" in capsys.readouterr().err
    for script, model in ((run_ppl_eval, ["--model_name_or_path", demo_checkpoint, *options]), (compress, [])):
        for flag in (["--lt_window", 4], ["--lt_sym"], ["--lt_clip_ratio", "auto"], ["--lt_group_size", 8]):
            assert invoke(script, *model, *flag) == 2
            assert f"{flag[0]} does nothing without quantised latents" in capsys.readouterr().err
        assert invoke(script, *model, "--lt_bits", 4, "--lt_value_bits", 7) == 2
        assert "lt_value_bits 7 must be one of" in capsys.readouterr().err


def test_a_rank_that_cannot_be_turned_is_refused_before_anything_is_loaded(demo_checkpoint, tmp_path, capsys):
    shutil.copytree(demo_checkpoint, tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    config["palu"]["layers"][0]["key"][0] = 29
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    options = ["--datasets", "demo", "--seqlen", 64, "--lt_bits", 4, "--lt_hadamard"]
    assert invoke(run_ppl_eval, "--model_name_or_path", tmp_path / "odd", *options) == 2
    assert "has a group of rank 29" in (error := capsys.readouterr().err)
    assert "compress with --lt_hadamard" in error
