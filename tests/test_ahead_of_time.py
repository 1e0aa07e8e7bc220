"""What is launched compiles for GPUs that are not here, within what those have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palu.kernels.latent_scores.factors import PART
from tests.compile_launches import MOST_SHARED

ROOT = Path(__file__).resolve().parents[1]
# Of codes and of heads, beside attention.
BESIDE = ("quantize_kernel", "dequantize_kernel", "rotate_kernel")
# Bytes of local memory per thread: the most that Triton 3.9 leaves, where columns of more than PART latents are kept
# too (3.6 leaves 592 of folded codes with 256 latents per head).
MOST_SPILLED = {"weight_kernel": (56, 56), "scores_kernel": (136, 440), "hopper_kernel": (160, 504)}
# Of keys that are interpolated, with four kv heads per group. Triton 3.6 leaves 120.
MOST_SPILLED_WINDOWS = 208
# Of windows of several key groups, or of several sections.
MOST_SPILLED_SEVERAL = 504
# Of windows of 256 latents of 8 bits, by the mode; Triton 3.6 leaves 264 and 408.
MOST_SPILLED_SECTIONS = {"folded": 544, "rotated": 800}
# Of more than 256 latents of keys; Triton 3.6 leaves 40 (4 bits), 328 (16 bits) and 360 (folded).
MOST_SPILLED_WIDE = 672
# Of 3 bits where keys have a norm or are interpolated and have two sections; Triton 3.6 leaves 208.
MOST_SPILLED_PLANES = 512
# Of numbers of 16 bits, for whose factors and the copies of them there is least room; Triton 3.6 leaves 104 (fp16).
MOST_SPILLED_NUMBERS = 352
# Of several queries and codes, two tiles of which are weighed at a time; Triton 3.6 leaves 128 (8 bits, biases).
MOST_SPILLED_CODES = 208
# Of several queries and a key norm; Triton 3.6 leaves 88.
MOST_SPILLED_NORMS = 416
# Of numbers of 16 bits and several queries whose values have more than 512 latents.
MOST_SPILLED_VALUES = 224
# Of seven queries of four kv heads, whose 32 columns of scores the sums of values have too.
MOST_SPILLED_COLUMNS = 256
# Share of the multiply-adds that an assembler may fold; of two wrongly merged pairs of heads nine percent were missing.
MOST_DROPPED = 0.05
# Multiply-adds that it folds of windows with eight slots: rows that a thread has of a window's matrix are of one query,
# turned once, in both places where windows are made; and besides, of numbers of 16 bits and three sections.
FOLDED_WINDOWS, FOLDED_NUMBERS = 96, 16


@pytest.mark.parametrize("architecture", list(MOST_SHARED))
@pytest.mark.parametrize("half", [0, 1])
def test_every_launch_compiles_and_fits(architecture, half, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.compile_launches", str(architecture), tmp_path, str(half)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} > {"weight_kernel", "scores_kernel", "values_kernel", *BESIDE}
    assert {row.get("mode") for row in rows} >= {None, "folded", "shared"}
    broken = [row for row in rows if "error" in row]
    assert not broken
    narrow = [row for row in rows if row["narrow"]]
    assert not narrow
    large = [row for row in rows if row["shared"] > MOST_SHARED[architecture]]
    assert not large
    spilling = [row for row in rows if row["spilled"] > most_spilled(row)]
    assert not spilling
    rebuilt = [row for row in rows if row["kernel"] == "hopper_kernel" and row["mode"] != "absorbed"]
    assert bool(rebuilt) == (architecture == 90)
    assert not [row for row in rebuilt if row["dropped"] > MOST_DROPPED * row["written"] and not is_folded(row)]
    assert not [row for row in rows if row.get("overwritten")]
    for row in rows:
        if row["kernel"] in (
            "table_kernel",
            "turn_kernel",
            "softmax_kernel",
            "combine_kernel",
            "hopper_combine_kernel",
            *BESIDE,
        ):
            continue
        streamed = row.get("mode") == "exact" or is_wide(row)
        assert streamed or row["asynchronous"], row
        if row.get("mode") != "absorbed":
            assert row["warpgroup"] == (architecture == 90 and row["kernel"] != "values_kernel"), row


def is_folded(row):
    """Whether the assembler made one of multiply-adds that are the same, and left all others."""
    windows = row["mode"] == "rotated" and row["span"] != "0" and row["slots"] == "8"
    numbers = (row["bits"], row["sections"]) == ("16", "3")
    return windows and row["dropped"] in (FOLDED_WINDOWS, FOLDED_WINDOWS + numbers * FOLDED_NUMBERS)


def most_spilled(row):
    """Bytes of local memory that a launch may take."""
    if row["kernel"] == "hopper_kernel" and row["mode"] != "absorbed" and int(row["rank"]) > 256:
        return MOST_SPILLED_WIDE
    planes = row["kernel"] == "hopper_kernel" and row["bits"] == "3"
    if planes and (row["has_norm"] == "True" or (row["span"], row["sections"]) == ("4096", "2")):
        return MOST_SPILLED_PLANES
    if row["kernel"] == "hopper_kernel" and row["span"] != "0":
        if (row["bits"], row["sections"]) == ("8", "4"):
            return MOST_SPILLED_SECTIONS[row["mode"]]
        if (row["sections"], row["key_groups"]) != ("1", "1"):
            return MOST_SPILLED_SEVERAL
        return MOST_SPILLED_NUMBERS if row["bits"] == "16" else MOST_SPILLED_WINDOWS
    if row.get("mode") == "rotated":
        if row["queries"] == "7":
            return MOST_SPILLED_COLUMNS
        if row["has_norm"] == "True":
            return MOST_SPILLED_NORMS
        if row["bits"] == "16" and row["chunks"] == "6":
            return MOST_SPILLED_VALUES
        if row["bits"] != "16" and not is_wide(row):
            return MOST_SPILLED_CODES
    return MOST_SPILLED.get(row["kernel"], (0, 0))[is_wide(row)]


def is_wide(row):
    """Whether a launch reads latents of more than one part."""
    return int(row.get("rank", 0)) > PART
