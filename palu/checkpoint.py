"""Checkpoints on disk: whole or not at all, loaded strictly."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from palu.core.errors import PaluError
from palu.core.hub import hub_reachable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Room for the tokenizer, the code and the file system's own needs beside the weights.
SPARE_BYTES = 64 << 20


def parse_dtype(name: str) -> torch.dtype | str:
    """A torch dtype from its name; `auto` stays as it is.

    Raises:
        PaluError: listing the names.
    """
    if name == "auto":
        return name
    if name not in DTYPES:
        raise PaluError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_config(path: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's config.

    Raises:
        PaluError: if the directory or hub name holds no readable config.
    """
    return _load(AutoConfig, path, trust_remote_code=trust_remote_code)


def load_model(
    path: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model, stock or compressed, in evaluation mode.

    Raises:
        PaluError: if it cannot be loaded, or tensors are missing or misshapen.
    """
    device_map = "auto" if device == "auto" else {"": device}
    model = _load(AutoModelForCausalLM, path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    return model.eval()


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
        PaluError: if there is none.
    """
    return _load(AutoTokenizer, path, trust_remote_code=trust_remote_code)


def _load(auto_class: Any, path: str | Path, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained`, with one line for what a user can mend."""
    is_local = Path(path).exists()
    if (is_local or str(path).startswith((".", "/", "~"))) and not (Path(path) / "config.json").is_file():
        raise PaluError(f"{path}: no model directory (config.json is missing)")
    try:
        return auto_class.from_pretrained(path, local_files_only=not is_local and not hub_reachable(), **kwargs)
    except PaluError:
        raise
    except torch.OutOfMemoryError as error:
        raise PaluError(f"{path}: does not fit into the memory of the device") from error
    except Exception as error:  # the hub client and the loaders raise a dozen unrelated types
        if not is_local and not hub_reachable():
            raise PaluError(f"{path}: no such directory here, and the hub cannot be reached") from error
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PaluError(f"{path}: cannot be loaded: {reason}") from error


def prepare_output(path: str | Path, overwrite: bool) -> Path:
    """Refuse an output directory that exists (or is a file) unless it may be replaced; before any long work.

    Raises:
        PaluError: saying what to do.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise PaluError(f"output directory {path} exists; choose another or pass --overwrite")
    if path.exists() and not path.is_dir():
        raise PaluError(f"output {path} is a file")
    if path.exists() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise PaluError(f"output directory {path} does not look like a checkpoint; it is not overwritten")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise PaluError(f"output directory {path}: {parent} is not writable")
    return path


def check_space(path: Path, needed_bytes: int) -> None:
    """Refuse to start where the checkpoint will not fit.

    Raises:
        PaluError: with both sizes.
    """
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + SPARE_BYTES:
        raise PaluError(f"no space for {path}: about {needed_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that becomes `path` at the end, or vanishes if anything fails.

    Raises:
        PaluError: if the disk is full.
    """
    partial = path.absolute().with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            replaced = partial.with_suffix(".replaced")
            path.rename(replaced)
            partial.rename(path)
            shutil.rmtree(replaced)
        else:
            partial.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PaluError(f"no space left on the device while writing {path}") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path,
    record: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write model, tokenizer, modelling code and `palu.json` (the record of how it was made).

    Raises:
        PaluError: if the disk is full; nothing is left behind.
    """
    with whole_directory(path) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if record is not None:
            (partial / "palu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
