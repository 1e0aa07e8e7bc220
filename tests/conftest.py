"""Fixtures that several test files share."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter; read when they are defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import palu
from palu.calibrate.text import DEMO_ASSETS
from palu.checkpoint import load_model, load_tokenizer, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True)
def fresh_seed():
    """Fresh random inputs each run; a failing test prints the seed in its captured output."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch seed {seed}")
    torch.manual_seed(seed)


@pytest.fixture
def empty_memory_is_nan():
    """Memory that nobody has written holds NaN, so that no result can come from it unnoticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def demo_model():
    """The bundled checkpoint in float32."""
    return load_model(DEMO_ASSETS / "model", torch.float32)


@pytest.fixture(scope="session")
def demo_tokenizer():
    return load_tokenizer(DEMO_ASSETS / "model")


@pytest.fixture(scope="session")
def demo_checkpoint(demo_model, demo_tokenizer, tmp_path_factory):
    """The demo model at half its cache, calibrated on a little text, saved in bfloat16."""
    config = palu.CompressionConfig(
        param_ratio_target=0.5,
        n_whiten_calib_samples=8,
        n_fisher_calib_samples=2,
        calib_seqlen=512,
        fisher_seqlen=256,
        calib_dataset="demo",
    )
    model = load_model(DEMO_ASSETS / "model", torch.float32)
    path = tmp_path_factory.mktemp("demo") / "checkpoint"
    save_checkpoint(palu.compress(model, demo_tokenizer, config).model.to(torch.bfloat16), demo_tokenizer, path)
    return path
