"""Calibration statistics on disk, keyed by everything that determines them."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
FORMAT = "palu-statistics-2"
# Entries of a config that change nothing in what the model computes.
IRRELEVANT = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache"}


def default_cache_dir() -> Path:
    """`$PALU_CACHE`, or a folder in the user's cache directory."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "palu"
    return Path(os.environ.get("PALU_CACHE", fallback))


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hash of every parameter's name, shape, dtype and bits (two checksums each, one of them weighted by position)."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        bits = parameter.detach().reshape(-1).view(torch.int16 if parameter.element_size() == 2 else torch.int32)
        sums = [0, 0]
        for start in range(0, bits.numel(), 1 << 24):
            piece = bits[start : start + (1 << 24)].long()
            position = torch.arange(start, start + piece.numel(), device=piece.device) % 65_521 + 1
            sums = [sums[0] + int(piece.sum()), sums[1] + int((piece * position).sum())]
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}{sums}".encode())
    return digest.hexdigest()


def tokens_fingerprint(windows: Tensor) -> str:
    """Hash of token windows: data set, tokenizer, sizes and seed all show in it."""
    return hashlib.sha256(repr(tuple(windows.shape)).encode() + windows.cpu().numpy().tobytes()).hexdigest()


def content_hash(tensors: dict[str, Tensor]) -> str:
    """Hash of tensors on the CPU and their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


class StatisticsStore:
    """Reads and writes one kind of statistic for one model and one set of windows.

    Args:
        directory: the cache's root.
        kind: what it is, with everything that determines it besides the model and the windows.
        model: fingerprinted with its whole config, its weights and its compute dtype.
        windows: the calibration tokens.
    """

    def __init__(self, directory: Path, kind: str, model: PreTrainedModel, windows: Tensor) -> None:
        config = {name: value for name, value in model.config.to_dict().items() if name not in IRRELEVANT}
        identity = {
            "format": FORMAT,
            "kind": kind,
            "config": config,
            "attention": model.config._attn_implementation,
            "device": model.device.type,
            "weights": weights_fingerprint(model),
            "tokens": tokens_fingerprint(windows),
        }
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self.directory = directory / f"{kind}-{self.key[:24]}"

    def holds(self, name: str) -> bool:
        """Whether `name` is there, whole and for these inputs; warns where it is stale or damaged."""
        path = self._path(name)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("key") != self.key:
                problem = "belongs to other inputs"
            elif metadata.get("sha256") != content_hash(load_file(path)):
                problem = "is damaged (its content does not match its checksum)"
            else:
                return True
        except (SafetensorError, OSError) as error:
            problem = f"is damaged ({error})"
        logger.warning("calibration cache %s %s; computing it again", path, problem)
        return False

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, which `holds` has approved."""
        return load_file(self._path(name))

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save tensors under `name`: whole, or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            tensors = {key: value.contiguous().cpu() for key, value in tensors.items()}
            save_file(tensors, partial, {"key": self.key, "sha256": content_hash(tensors)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def stream(
        self, computed: Iterable[dict[str, Tensor]], count: int, device: torch.device
    ) -> Iterator[dict[str, Tensor]]:
        """`count` groups of tensors, a file each: read if all are there, else from `computed`, saved as they come."""
        names = [f"{index:04d}" for index in range(count)]
        if all([self.holds(name) for name in names]):
            logger.info("statistics read from %s", self.directory)
            for name in names:
                yield {key: tensor.to(device) for key, tensor in self.read(name).items()}
            return
        for name, tensors in zip(names, computed, strict=True):
            self.write(name, tensors)
            yield tensors
