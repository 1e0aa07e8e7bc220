"""Checkpoints load anywhere, whole or not at all, bit for bit."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from palu.checkpoint import load_model, prepare_output, save_checkpoint, whole_directory
from palu.config import LatentConfig
from palu.core.errors import PaluError
from palu.models import ADAPTERS, get_adapter
from palu.nn.latent_cache import LatentCache
from tests.helpers import FAMILIES, compressed, random_windows, tiny_model


def all_tensors(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_round_trip_gives_the_same_logits_and_the_same_bits(family, tmp_path):
    latent = compressed(tiny_model(family), 0.6, value_group_size="all").model
    save_checkpoint(latent, None, tmp_path / "a", max_shard_size="60KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    ids = random_windows(latent, 2, 20)
    assert torch.equal(loaded(ids).logits, latent(ids).logits)
    assert loaded.config.latent == latent.config.latent
    loaded.save_pretrained(tmp_path / "b")
    first, again = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "a" / name).read_text()) == json.loads((tmp_path / "b" / name).read_text())


@torch.no_grad()
def test_auto_classes_dtype_and_device_map(demo_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, device_map="auto", dtype=torch.float16)
    assert model.dtype == torch.float16
    assert AutoModelForCausalLM.from_pretrained(demo_checkpoint).dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    batch = tokenizer("It was a dark night", return_tensors="pt", return_token_type_ids=False)
    cache = model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True).past_key_values
    assert isinstance(cache, LatentCache)
    hidden = AutoModel.from_pretrained(demo_checkpoint)(**batch)
    assert isinstance(hidden.past_key_values, LatentCache)


def test_ranks_method_and_calibration_are_in_the_config(demo_checkpoint):
    config = AutoConfig.from_pretrained(demo_checkpoint)
    compression = config.latent.compression
    assert len(config.latent.layers) == 5
    assert compression["search_method"] == "global"
    assert compression["decompose_method"] == "fisher"
    assert compression["calibration"]["moments"]["windows"] == 8
    assert compression["source_model"].endswith("model")


REMOTE = """
import sys
sys.modules["palu"] = None  # any import of it fails
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
path, copy = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
except ValueError as error:
    print("REFUSED", "trust_remote_code=True" in str(error))
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
batch = tokenizer("It was a dark night", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**batch, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
print("TOKENS", output.sequences[0].tolist())
print("CACHE", type(output.past_key_values).__name__, output.past_key_values.nbytes())
model.save_pretrained(copy)
again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
print("AGAIN", torch.equal(again(batch.input_ids).logits, model(batch.input_ids).logits))
print("BASE", type(AutoModel.from_pretrained(path, trust_remote_code=True)).__name__)
"""


def test_without_palu_the_checkpoints_own_code_gives_the_same_tokens(demo_checkpoint, tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", REMOTE, str(demo_checkpoint), str(tmp_path / "copy")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    model = load_model(demo_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    batch = tokenizer("It was a dark night", return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**batch, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert lines["REFUSED"] == "True"
    assert lines["TOKENS"] == str(output.sequences[0].tolist())
    assert lines["CACHE"] == f"LatentCache {output.past_key_values.nbytes()}"
    assert lines["AGAIN"] == "True"
    assert lines["BASE"] == "PaluLlamaModel"


def damage(source, target, change):
    target.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".py"):
            (target / path.name).write_bytes(path.read_bytes())
    tensors = all_tensors(source)
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def test_missing_tensors_are_refused_by_name(demo_checkpoint, tmp_path):
    name = "model.layers.2.self_attn.v_proj.up"
    damage(demo_checkpoint, tmp_path / "bad", lambda tensors: tensors.pop(name))
    with pytest.raises(PaluError, match=f"1 missing tensors: {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), {}, "1 missing tensors: model.layers.1.mlp.up_proj"),
        (lambda t: None, {"attention_bias": True}, "12 missing tensors: model.layers.0.self_attn.k_proj.bias"),
        (lambda t: None, {"num_hidden_layers": 2}, "9 unexpected tensors: model.layers.2"),
        (lambda t: None, {"intermediate_size": 95}, "9 misshapen tensors: model.layers.0.mlp"),
    ],
)
def test_a_stock_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path, change, config, message):
    tiny_model("llama").save_pretrained(tmp_path / "stock")
    damage(tmp_path / "stock", tmp_path / "bad", change)
    entries = json.loads((tmp_path / "bad" / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps(entries | config))
    with pytest.raises(PaluError, match=message):
        load_model(tmp_path / "bad")


def test_misshapen_tensors_are_refused_by_name(demo_checkpoint, tmp_path):
    name = "model.layers.1.self_attn.k_proj.down.weight"

    def shorten(tensors):
        tensors[name] = tensors[name][:-1].contiguous()

    damage(demo_checkpoint, tmp_path / "bad", shorten)
    with pytest.raises(PaluError, match=f"1 misshapen tensors: {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: block.update(layers=block["layers"][:-1]), "ranks for 4 layers, the model has 5"),
        (lambda block: block["layers"][3].update(key=[9999]), r"layer 3, key: ranks \[9999\] must lie in 1..256"),
        (lambda block: block["layers"][0].update(value=[1, 1, 1]), "layer 0, value: 3 groups do not divide 4 kv heads"),
        (lambda block: block["layers"][0].update(value="64"), "layer 0: needs lists of integer ranks"),
        (lambda block: block.update(format_version=99), "format_version 99"),
        (lambda block: block.update(surprise=1), "unknown entries: surprise"),
    ],
)
def test_a_malformed_block_is_refused(demo_checkpoint, tmp_path, change, message):
    damage(demo_checkpoint, tmp_path / "bad", lambda tensors: None)
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    change(config["palu"])
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PaluError, match=message):
        load_model(tmp_path / "bad")


def test_the_block_survives_json():
    latent = compressed(tiny_model("llama"), 0.5).model.config.latent
    assert LatentConfig.from_dict(json.loads(json.dumps(latent.to_dict()))) == latent


def test_an_unsupported_family_lists_the_supported_ones():
    with pytest.raises(PaluError, match="'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"):
        get_adapter(AutoConfig.for_model("gpt2"))
    assert list(ADAPTERS) == ["llama", "mistral", "qwen2", "qwen3"]


def test_a_compressed_model_cannot_be_compressed_again():
    with pytest.raises(PaluError, match="compressed already"):
        compressed(compressed(tiny_model("llama")).model)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_changes_with_the_length_is_refused(rope_type):
    model = tiny_model("llama")
    model.config.rope_parameters["rope_type"] = rope_type
    with pytest.raises(PaluError, match=f"'{rope_type}' is not supported; supported: default, linear, llama3, yarn"):
        compressed(model)


@torch.no_grad()
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=["linear", "yarn"],
)
def test_static_rope_scalings_are_exact(parameters):
    model = tiny_model("llama", rope_parameters=parameters)
    latent = compressed(model).model
    ids = random_windows(model, 2, 40)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), latent.generate(ids, **options))


def test_nothing_half_written_is_left(tmp_path):
    def write_half():
        with whole_directory(tmp_path / "out") as partial:
            (partial / "weights").write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    latent = compressed(tiny_model("llama"), 0.5).model
    target = tmp_path / "out"
    save_checkpoint(latent, None, target)
    before = sorted(path.name for path in target.iterdir())

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(latent), "save_pretrained", no_space)
    with pytest.raises(PaluError, match="no space left"):
        save_checkpoint(latent, None, target, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_needs_leave_and_spares_what_is_no_checkpoint(tmp_path):
    tmp_path = tmp_path / "out"
    tmp_path.mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PaluError, match="exists; choose another or pass --overwrite"):
        prepare_output(tmp_path, overwrite=False)
    assert prepare_output(tmp_path, overwrite=True) == tmp_path
    (tmp_path.parent / "link").symlink_to(tmp_path)
    assert prepare_output(tmp_path.parent / "link", overwrite=True) == tmp_path
    with pytest.raises(PaluError, match="is the model that is read"):
        prepare_output(tmp_path.parent / "link", overwrite=True, sources=[tmp_path])
    with pytest.raises(PaluError, match="exists"):
        save_checkpoint(compressed(tiny_model("llama")).model, None, tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "thesis.tex")
    with pytest.raises(PaluError, match="does not look like a checkpoint"):
        prepare_output(tmp_path, overwrite=True)
