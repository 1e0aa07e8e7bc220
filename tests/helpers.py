"""Small models of every family whose weights are large enough to show an error in the logits; running scripts."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import palu
from palu.calibrate.windows import CalibrationWindows
from utils.cli import run_script

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16}),
    "llama-3.1": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16, "rope_parameters": LLAMA3_SCALING}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": 11}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def tiny_model(family: str, attention: str = "sdpa", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float32 model in evaluation mode; norms and biases are random too."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class._from_config(config_class(**(SHAPE | extra | changes)), attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def random_windows(model: PreTrainedModel, count: int = 4, seqlen: int = 48, seed: int = 0) -> torch.Tensor:
    """Random token ids without the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (count, seqlen), generator=generator)


def compressed(
    model: PreTrainedModel, ratio: float = 1.0, windows: torch.Tensor | None = None, **options: object
) -> palu.Compression:
    """Compress on random tokens or on `windows`; full rank and plain SVD unless told otherwise."""
    settings = {"head_group_size": 2, "search_method": "uniform", "decompose_method": "svd", "rank_multiple": 4}
    config = palu.CompressionConfig(param_ratio_target=ratio, **(settings | options))
    windows = random_windows(model) if windows is None else windows
    return palu.compress(model, config=config, windows=CalibrationWindows(windows, windows))


def left_padded_batch(model: PreTrainedModel, length: int = 24) -> dict[str, torch.Tensor]:
    """Four rows, padded on the left by different amounts."""
    ids = random_windows(model, 4, length, seed=int(torch.randint(1 << 30, ())))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 7, length - 1)):
        mask[row, :padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PALU_CACHE", str(tmp_path / "cache"))


def example(name):
    """A script under examples/, as a module."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def invoke(script, *argv):
    """Run a script in this process; its exit code, 0 if it ends well."""
    try:
        run_script(script.parse, script.main, [str(part) for part in argv])
    except SystemExit as stop:
        return stop.code
    return 0
