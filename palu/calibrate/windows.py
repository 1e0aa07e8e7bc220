"""Text to windows of token ids."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from palu.calibrate.store import tokens_fingerprint
from palu.core.errors import PaluError
from palu.core.types import Statistic

logger = logging.getLogger(__name__)
# The windows that every statistic is gathered on.
WINDOWS_OF = {
    Statistic.MOMENTS: "moments",
    Statistic.FISHER: "fisher",
    Statistic.OUTPUT_FISHER: "fisher",
    Statistic.DAMAGE: "moments",
}


def kinds_of_windows(needed: frozenset[Statistic]) -> set[str]:
    """Which of `CalibrationWindows` the statistics are gathered on."""
    return {WINDOWS_OF[statistic] for statistic in needed}


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, where: str, config: PreTrainedConfig) -> Tensor:
    """Token ids of a whole text, int64 [tokens].

    Raises:
        PaluError: if the text is empty, or the tokenizer makes ids that the model does not have.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if not text.strip() or ids.numel() == 0:
        raise PaluError(f"{where}: the text is empty")
    check_vocabulary(ids, config, where)
    return ids


def check_vocabulary(ids: Tensor, config: PreTrainedConfig, where: str) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        PaluError: with the largest one.
    """
    if int(ids.max()) >= config.vocab_size or int(ids.min()) < 0:
        raise PaluError(f"{where}: token id {int(ids.max())} is there, the model has {config.vocab_size}")


def check_seqlen(seqlen: int, config: PreTrainedConfig, name: str = "seqlen") -> None:
    """Refuse windows longer than the model's positions.

    Raises:
        PaluError: naming the allowed range.
    """
    limit = config.max_position_embeddings
    if not 2 <= seqlen <= limit:
        raise PaluError(f"{name} {seqlen} must lie in 2..{limit} (the model's max_position_embeddings)")


def consecutive_windows(tokens: Tensor, seqlen: int, where: str) -> Tensor:
    """All whole windows in order, [windows, seqlen].

    Raises:
        PaluError: if there is not even one.
    """
    count = tokens.numel() // seqlen
    if count == 0:
        raise PaluError(f"{where}: {tokens.numel()} tokens are too few for one window of {seqlen}; give more text")
    return tokens[: count * seqlen].view(count, seqlen)


def sample_windows(tokens: Tensor, count: int, seqlen: int, seed: int, where: str) -> Tensor:
    """`count` windows that do not overlap, drawn by `seed`, [count, seqlen]; all there are if there are fewer.

    Raises:
        PaluError: if there is not even one.
    """
    windows = consecutive_windows(tokens, seqlen, where)
    if len(windows) < count:
        logger.warning("%s holds %d windows of %d tokens, %d were asked for", where, len(windows), seqlen, count)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


@dataclass(frozen=True)
class CalibrationWindows:
    """Token windows for the input moments and for the Fisher information, int64 [windows, seqlen]; None if unneeded."""

    moments: Tensor | None
    fisher: Tensor | None

    def __post_init__(self) -> None:
        for name, windows in (("moments", self.moments), ("fisher", self.fisher)):
            if windows is not None and (windows.ndim != 2 or windows.dtype != torch.int64 or len(windows) == 0):
                raise PaluError(f"{name} windows must be int64 [windows, seqlen], not {windows.dtype} {windows.shape}")

    def only(self, needed: frozenset[Statistic]) -> "CalibrationWindows":
        """The windows that the needed statistics are gathered on.

        Raises:
            PaluError: if some are missing.
        """
        given = {"moments": self.moments, "fisher": self.fisher}
        names = kinds_of_windows(needed)
        missing = sorted(name for name in names if given[name] is None)
        if missing:
            raise PaluError(f"no calibration windows for the {', '.join(missing)} statistic")
        return CalibrationWindows(**{name: windows if name in names else None for name, windows in given.items()})

    def describe(self) -> dict[str, Any]:
        """Sizes and fingerprints, for the record."""
        named = (("moments", self.moments), ("fisher", self.fisher))
        return {
            name: {"windows": len(windows), "seqlen": windows.shape[1], "sha256": tokens_fingerprint(windows)}
            for name, windows in named
            if windows is not None
        }
