"""What decode attention launches compiles for GPUs that are not here, within what those have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Bytes of shared memory that one block may have: A100, RTX 4090 and L40, H100 and H200.
MOST_SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
# Bytes of local memory per thread, just above the worst that Triton 3.6 and 3.9 leave under the launches' register
# limits. 3.6: of the weights' kernel 880, 784, 216, of the scores' 168, 72, 288; 3.9: 272, 240, 296 and 152, 96, 184.
MOST_SPILLED = {"weight_kernel": {80: 888, 89: 792, 90: 304}, "scores_kernel": {80: 176, 89: 104, 90: 296}}
NOT_SPILLING = {"values_kernel", "turn_kernel", "combine_kernel"}


@pytest.mark.parametrize("architecture", list(MOST_SHARED))
def test_every_launch_compiles_and_fits(architecture, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.compile_launches", str(architecture), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == NOT_SPILLING | set(MOST_SPILLED)
    assert {row.get("mode") for row in rows} == {None, "interpolated", "exact", "absorbed"}
    broken = [row for row in rows if "error" in row]
    assert not broken
    large = [row for row in rows if row["shared"] > MOST_SHARED[architecture]]
    assert not large
    allowed = {kernel: most[architecture] for kernel, most in MOST_SPILLED.items()}
    spilling = [row for row in rows if row["spilled"] > allowed.get(row["kernel"], 0)]
    assert not spilling
    for row in rows:
        if row["kernel"] in ("turn_kernel", "combine_kernel"):
            continue
        assert row["asynchronous"] == (row.get("mode") != "exact"), row
        if row.get("mode") != "absorbed":
            assert row["warpgroup"] == (architecture == 90 and row["kernel"] != "values_kernel"), row
