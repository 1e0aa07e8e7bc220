"""Clip ratios that are searched on calibration text."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
import palu
import run_ppl_eval
from palu.calibrate.clip import CANDIDATES
from palu.calibrate.text import DEMO_ASSETS
from palu.core.errors import PaluError
from palu.kernels.quantize import quantize
from tests.helpers import compressed, invoke, random_windows, tiny_model
from utils.results import read_results

AUTO = palu.QuantizationConfig(3, 2, group_size=8, clip_ratio="auto")


@torch.no_grad()
def test_the_ratio_of_least_squared_error_is_chosen_for_every_group():
    latent = compressed(tiny_model("llama"), 0.75).model
    palu.set_quantization(latent, AUTO)
    windows = random_windows(latent, 4, 30)
    seen = []
    attention = latent.model.layers[1].self_attn
    handle = attention.v_proj.down.register_forward_hook(lambda module, args, output: seen.append(output))
    palu.search_clip_ratios(latent, windows)
    handle.remove()
    settings = latent.config.latent.quantization
    plain = dataclasses.replace(settings, clip_ratio=1.0).of(latent.config.latent.layers[1].value, "value", 1)
    latents = torch.cat([part.flatten(0, 1) for part in seen])[None]
    for group, chosen in enumerate(settings.clip_ratios["value"][1]):
        errors = {}
        for ratio in CANDIDATES:
            packed = quantize(latents, dataclasses.replace(plain, clip_ratios=(ratio,) * len(plain.widths)))
            difference = packed.dequantized(torch.float32) - latents
            errors[ratio] = difference.split(list(plain.widths), dim=-1)[group].square().sum().item()
        assert chosen in CANDIDATES
        assert errors[chosen] <= 1.0001 * min(errors.values())
    assert any(ratio < 1 for layer in settings.clip_ratios["value"] for ratio in layer)


@torch.no_grad()
def test_found_ratios_are_saved_used_and_dropped_for_other_codes(tmp_path):
    latent = compressed(tiny_model("llama"), 0.75, quantization=AUTO).model
    settings = latent.config.latent.quantization
    assert settings.clip_ratios is not None
    ids = random_windows(latent, 2, 30)
    latent.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, latent(ids).logits)
    palu.set_quantization(loaded, dataclasses.replace(settings, clip_ratio=1.0, clip_ratios=None))
    assert not torch.equal(loaded(ids).logits, latent(ids).logits)
    assert settings.changed(key_bits=3, window=4).clip_ratios == settings.clip_ratios
    assert settings.changed(key_bits=4).needs_search
    palu.fold_hadamard(latent)
    with pytest.raises(PaluError, match="ratios have not been searched"):
        latent(ids)


def test_scripts_search_save_and_search_again(tmp_path, capsys):
    asked = ["--n_whiten_calib_samples", 4, "--n_fisher_calib_samples", 2, "--calib_seqlen", 256]
    made = ["--output_dir", tmp_path / "m", "--results", tmp_path / "c.json", "--lt_bits", 2, "--lt_hadamard"]
    assert invoke(compress, *asked, *made, "--lt_clip_ratio", "auto") == 0
    assert "clip ratios" in {row.get("stage") for row in read_results(tmp_path / "c.json")["rows"]}
    options = ["--datasets", "demo", "--seqlen", 256, "--max_windows", 2, "--results", tmp_path / "r.json"]
    found = []
    for flags in ([], ["--lt_clip_ratio", "auto"], ["--lt_clip_ratio", 1], ["--lt_bits", 3], ["--lt_bits", 16]):
        assert invoke(run_ppl_eval, "--model_name_or_path", tmp_path / "m", *options, *flags) == 0
        found.append(read_results(tmp_path / "r.json")["rows"][0])
    assert found[0]["perplexity"] == found[1]["perplexity"] != found[2]["perplexity"]
    assert [row["bits"] for row in found] == [2, 2, 2, 3, 16]
    assert found[0]["kv_bytes_per_token"] < found[3]["kv_bytes_per_token"] < found[4]["kv_bytes_per_token"]
    capsys.readouterr()
    model = ["--model_name_or_path", tmp_path / "m"]
    assert invoke(run_ppl_eval, *model, *options, "--lt_bits", 3, "--lt_calib_dataset", "nowhere.txt") == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert invoke(run_ppl_eval, *model, *options, "--lt_clip_ratio", 1, "--lt_calib_dataset", "demo") == 2
    assert "--lt_calib_dataset is for --lt_clip_ratio auto" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("Too short.")
    assert invoke(run_ppl_eval, *model, *options, "--lt_calib_dataset", tmp_path / "short.txt") == 2
    assert "short.txt" in (error := capsys.readouterr().err)
    assert "tokens are too few" in error
    assert invoke(run_ppl_eval, *model, *options, "--lt_clip_ratio", "1.5") == 2
    assert "must lie in (0, 1] or be auto" in capsys.readouterr().err


def test_perplexity_of_codes_does_not_depend_on_the_chunks(demo_checkpoint, tmp_path):
    options = ["--datasets", "demo", "--seqlen", 200, "--max_windows", 2, "--dtype", "float32", "--lt_bits", 4]
    found = []
    for chunk in ([], ["--prefill_chunk", 64], ["--prefill_chunk", 199, "--batch_size", 2]):
        results = ["--results", tmp_path / "r.json"]
        assert invoke(run_ppl_eval, "--model_name_or_path", demo_checkpoint, *options, *results, *chunk) == 0
        found.append(read_results(tmp_path / "r.json")["rows"][0])
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=2e-4)
    assert found[0]["perplexity"] == pytest.approx(found[2]["perplexity"], rel=2e-4)
    assert len({row["kv_bytes_per_token"] for row in found}) == 1
    assert invoke(run_ppl_eval, "--model_name_or_path", DEMO_ASSETS / "model", *options[:-2], "--prefill_chunk", 0) == 2
