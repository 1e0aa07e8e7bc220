"""Predictions on disk, one JSON line each, written as they are made and read again by the next run."""

import json
import os
from pathlib import Path
from typing import Any


class PredictionLog:
    """A .jsonl file of predictions by row number; what an interrupted run left behind is repaired.

    A line that was half-written when the run was killed, and anything behind it, is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: dict[int, dict[str, Any]] = {}
        if path.is_file():
            self._read()

    def _read(self) -> None:
        good, content = 0, self.path.read_bytes()
        for line in content.splitlines(keepends=True):
            entry = _entry(line)
            if entry is None:
                break
            self.made[entry["row"]] = entry
            good += len(line)
        if good < len(content):
            with self.path.open("r+b") as file:
                file.truncate(good)

    def append(self, row: int, entry: dict[str, Any]) -> None:
        """Add one prediction; it is on disk when this returns."""
        self.made[row] = {"row": row, **entry}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write((json.dumps(self.made[row], ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def _entry(line: bytes) -> dict[str, Any] | None:
    """A whole line's prediction, None of a damaged one."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(entry, dict) and {"row", "prediction"} <= set(entry)
    return entry if whole else None
