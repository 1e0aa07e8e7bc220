"""Checkpoints on disk: whole or not at all, loaded strictly."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
from palu.models.base import check_loading_info

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
        PaluError: if the directory or hub name holds no readable config of a language model.
    """
    config = _load(AutoConfig, path, trust_remote_code=trust_remote_code)
    if getattr(config, "max_position_embeddings", None) is None or getattr(config, "vocab_size", None) is None:
        raise PaluError(f"{path}: {config.model_type!r} is no language model with positions and a vocabulary")
    return config


def check_weight_files(path: str | Path) -> None:
    """Refuse a local model directory without weights, or with a damaged weight file; reads the files' headers only.

    Raises:
        PaluError: naming the file.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if Path(path).is_dir() and not files and not list(Path(path).glob("*.bin")):
        raise PaluError(f"{path}: no weights (*.safetensors) in this directory")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise PaluError(f"{file} is damaged: {error}") from error


def load_model(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> PreTrainedModel:
    """A causal language model, stock or compressed, in evaluation mode.

    Args:
        attention: transformers' name of an attention implementation, or None for its default.

    Raises:
        PaluError: if it cannot be loaded, or its tensors are not exactly those that its config asks for.
    """
    model, info = _load(
        AutoModelForCausalLM,
        path,
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **({} if attention is None else {"attn_implementation": attention}),
    )
    check_loading_info(path, info)
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
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        what = auto_class.__name__.removeprefix("Auto").removesuffix("ForCausalLM").lower()
        raise PaluError(f"{path}: the {what} cannot be loaded: {reason}") from error


def prepare_output(path: str | Path, overwrite: bool, sources: Sequence[str | Path] = ()) -> Path:
    """Check an output directory before any long work; returns it with links resolved.

    Args:
        overwrite: whether a checkpoint that is there may be replaced.
        sources: directories that must not be replaced because they are read.

    Raises:
        PaluError: saying what is wrong and what to do.
    """
    resolved = Path(path).resolve()
    if resolved.exists() and not overwrite:
        raise PaluError(f"output directory {path} exists; choose another or pass --overwrite")
    if resolved.exists() and not resolved.is_dir():
        raise PaluError(f"output {path} is a file")
    if any(Path(source).exists() and Path(source).resolve() == resolved for source in sources):
        raise PaluError(f"output directory {path} is the model that is read; choose another")
    if resolved in (Path.cwd(), *Path.cwd().parents):
        raise PaluError(f"output directory {path} holds the current directory; choose another")
    if resolved.exists() and any(resolved.iterdir()) and not (resolved / "config.json").is_file():
        raise PaluError(f"output directory {path} does not look like a checkpoint; it is not overwritten")
    parent = _existing_parent(resolved)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PaluError(f"output directory {path}: {parent} is not a directory that can be written to")
    return resolved


def check_shard_size(size: str) -> str:
    """Refuse a shard size that transformers would not understand.

    Raises:
        PaluError: with an example.
    """
    if not re.fullmatch(r"[1-9][0-9]*(KB|MB|GB)", size):
        raise PaluError(f"max_shard_size {size!r} must be a whole number with KB, MB or GB, such as 5GB")
    return size


def check_space(path: Path, needed_bytes: int) -> None:
    """Refuse to start where the checkpoint will not fit.

    Raises:
        PaluError: with both sizes.
    """
    free = shutil.disk_usage(_existing_parent(path)).free
    if free < needed_bytes + SPARE_BYTES:
        raise PaluError(f"no space for {path}: about {needed_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that becomes `path` at the end, or vanishes if anything fails.

    Raises:
        PaluError: if the disk is full.
    """
    partial = path.absolute().with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = partial.with_suffix(".replaced")
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rename(replaced)
        try:
            partial.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PaluError(f"no space left on the device while writing {path}") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    record: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write model, tokenizer, modelling code and `palu.json` (the record of how it was made).

    Raises:
        PaluError: if the directory exists and may not be replaced, or the disk is full; nothing is left behind.
    """
    with whole_directory(prepare_output(path, overwrite)) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if record is not None:
            (partial / "palu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
