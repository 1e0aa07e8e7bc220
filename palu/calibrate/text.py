"""Text by name or from files."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from palu.core.errors import PaluError
from palu.core.hub import hub_reachable

Purpose = Literal["calibration", "evaluation"]

DEMO_ASSETS = Path(__file__).resolve().parents[2] / "assets" / "demo"
FILE_HINT = "or give a .txt, .jsonl, .json or .parquet file, or a directory of them"
TEXT_FIELDS = ("text", "content", "sentence", "document")
CALIBRATION_ROWS = 20_000
C4_EVALUATION_ROWS = 1_100


def load_text(name: str, purpose: Purpose, seed: int = 0) -> str:
    """The text of a data set, a file or a directory.

    Args:
        name: demo, wikitext2, c4, ptb or alpaca; or a path.
        purpose: training text for calibration, test or validation text for evaluation (a path is taken as it is).
        seed: draws the rows of data sets that are larger than any calibration needs.

    Raises:
        PaluError: if the name is neither known nor a path, the file cannot be read, or the hub cannot be reached.
    """
    if name in DATASETS:
        return DATASETS[name](purpose, seed)
    path = Path(name)
    if not path.exists():
        raise PaluError(f"data set {name!r} is unknown and no such file exists; use {', '.join(DATASETS)}, {FILE_HINT}")
    if not path.is_file() and not path.is_dir():
        raise PaluError(f"{path} is neither a file nor a directory")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS)
    if not files:
        raise PaluError(f"{path}: no {', '.join(filter(None, READERS))} file in this directory")
    return "\n\n".join(_read_file(file) for file in files)


def _read_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise PaluError(f"{path}: text of type {suffix} is not known; use {', '.join(filter(None, READERS))}")
    try:
        return READERS[suffix](path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise PaluError(f"{path}: cannot be read as {path.suffix or 'text'}: {error}") from error


def _read_plain(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")


def _read_jsonl(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as lines:
        return "\n\n".join(row_text(json.loads(line), path) for line in lines if line.strip())


def _read_json(path: Path) -> str:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    return "\n\n".join(row_text(row, path) for row in (rows if isinstance(rows, list) else [rows]))


def _read_parquet(path: Path) -> str:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise PaluError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from error
    try:
        return "\n\n".join(row_text(row, path) for row in parquet.read_table(path).to_pylist())
    except ArrowException as error:
        raise PaluError(f"{path}: cannot be read as parquet: {error}") from error


READERS: dict[str, Callable[[Path], str]] = {
    "": _read_plain,
    ".txt": _read_plain,
    ".raw": _read_plain,
    ".md": _read_plain,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def row_text(row: Any, where: object) -> str:
    """The text of one row: a plain string, one of the usual text columns, or an instruction with its answer.

    Raises:
        PaluError: naming the columns that the row has.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for column in TEXT_FIELDS:
            if isinstance(row.get(column), str):
                return row[column]
            if column in row:
                raise PaluError(f"{where}: a row's {column!r} is {row[column]!r}, not text")
        if isinstance(row.get("instruction"), str):
            parts = (row["instruction"], row.get("input") or "", row.get("output") or "")
            return "\n".join(part for part in parts if part)
    columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise PaluError(f"{where}: no text column among {columns}; one of {', '.join(TEXT_FIELDS)} is needed")


def _demo(purpose: Purpose, seed: int) -> str:
    return _read_file(DEMO_ASSETS / f"{purpose}.txt")


def _hub_rows(name: str, *args: str, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, with one clear line where it cannot be had."""
    try:
        import datasets
    except ImportError as error:
        raise PaluError(f"data set {name!r} needs the 'datasets' package; install it {FILE_HINT}") from error
    if not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # what an earlier run has downloaded may still serve
    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:  # the hub client raises a dozen unrelated types for "cannot be reached"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PaluError(f"data set {name!r} cannot be loaded from the hub ({reason}); go online {FILE_HINT}") from error


def _sample(rows: Any, seed: int) -> Iterator[Any]:
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return (rows[index] for index in order[:CALIBRATION_ROWS])


def _wikitext2(purpose: Purpose, seed: int) -> str:
    split = "train" if purpose == "calibration" else "test"
    rows = _hub_rows("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    return "\n\n".join(rows["text"])


def _c4(purpose: Purpose, seed: int) -> str:
    file = (
        "en/c4-train.00000-of-01024.json.gz" if purpose == "calibration" else "en/c4-validation.00000-of-00008.json.gz"
    )
    rows = _hub_rows("c4", "allenai/c4", data_files={"rows": file}, split="rows")
    if purpose == "evaluation":
        return " ".join(rows[:C4_EVALUATION_ROWS]["text"])
    return "\n\n".join(row["text"] for row in _sample(rows, seed))


def _ptb(purpose: Purpose, seed: int) -> str:
    split = "train" if purpose == "calibration" else "test"
    rows = _hub_rows("ptb", "ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split=split)
    return " ".join(rows["sentence"])


def _alpaca(purpose: Purpose, seed: int) -> str:
    rows = _hub_rows("alpaca", "tatsu-lab/alpaca", split="train")
    return "\n\n".join(row_text(row, "alpaca") for row in _sample(rows, seed))


DATASETS: dict[str, Callable[[Purpose, int], str]] = {
    "demo": _demo,
    "wikitext2": _wikitext2,
    "c4": _c4,
    "ptb": _ptb,
    "alpaca": _alpaca,
}
