"""The kernels compile for GPUs that are not here, within what those have."""

import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json, pathlib, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from palu.kernels.decode_attention import kernel

architecture = int(sys.argv[1])
TOOL = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HALF, FLOAT, INT = "*fp16", "*fp32", "*i32"
ALIGNED = {"latents_t", "latents_b", "up_stride", "table_t", "table_b", "scores_length", "scores_start"}
SHARED = dict(HEADS_PER_GROUP=4, DIVISOR=64)
SCORES = dict(HEAD_DIM=128, HALF=64, BLOCK_QUERIES=16, KV_HEADS=8, WIDTH=1024, HAS_BIAS=True, HAS_NORM=True,
              MASK="bool", BLOCK_RANK=128, CHUNKS=1, BLOCK=64, STAGES=2, QUERIES=4)
VALUES = dict(HEADS=32, BLOCK_HEADS=16, WIDTH=3072, RANK_STRIDE=384, DTYPE=triton.language.float16, BLOCK_RANK=128,
              BLOCK=64, BLOCK_PEAKS=256)
POINTERS = dict.fromkeys(("query", "scales", "zeros", "up", "bias", "norm", "cos", "sin"), HALF)
POINTERS |= dict.fromkeys(("scores", "peaks", "sums", "totals"), FLOAT) | {"mask": "*i1", "norm_epsilon": "fp32"}
POINTERS |= dict.fromkeys(("rank_of", "offset_of", "chunk_group", "chunk_column"), INT)
for bits in (16, 8, 4, 3, 2):
    large = SCORES | {"BLOCK_RANK": 64, "CHUNKS": 4}
    for function, constants in ((kernel.scores_kernel, SCORES), (kernel.scores_kernel, large),
                                (kernel.values_kernel, VALUES)):
        constants = SHARED | constants | {"BITS": bits, "ASYMMETRIC": bits < 16}
        if function is kernel.values_kernel:
            constants["ASSEMBLY"] = bits < 16
        types = POINTERS | {"latents": HALF if bits == 16 else "*u8"}
        names = [parameter.name for parameter in function.params]
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ALIGNED]
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
        code = compiled.asm["ptx"]
        binary = pathlib.Path(sys.argv[2]) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOL, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
        spilled = max(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\\d+)", usage))
        print(json.dumps({
            "bits": bits, "kernel": function.__name__, "shared": compiled.metadata.shared, "spilled": spilled,
            "kept": constants.get("CHUNKS", 1) == 1, "warpgroup": "wgmma" in code, "asynchronous": "cp.async" in code,
        }))
"""
# Bytes of shared memory that one block may have: A100, RTX 4090 and L40, H100 and H200.
MOST_SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


@pytest.mark.parametrize("architecture", list(MOST_SHARED))
def test_kernels_compile_and_fit(architecture, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(architecture), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 15
    for row in rows:
        assert row["shared"] <= MOST_SHARED[architecture], row
        # Bytes of local memory per thread: two dozen registers at most, in the variant for large ranks.
        assert row["spilled"] <= (0 if row["kept"] else 96), row
        assert row["asynchronous"] or not row["kept"], row
        assert row["warpgroup"] == (architecture == 90 and row["kernel"] == "scores_kernel"), row
