"""Records the launches of all kernels on the CPU and compiles them for a GPU that need not be here.

    TRITON_INTERPRET=0 python -m tests.compile_launches ARCHITECTURE FOLDER [0 or 1: which half]

prints a line of JSON for every kernel compiled: what it is, and the shared and local memory that it takes, or why it
does not compile.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.experimental.gluon._runtime import GluonASTSource

from palu.kernels.decode_attention import launch as attention
from palu.kernels.decode_attention import parts
from palu.kernels.decode_attention.hopper import kind as hopper_kind
from palu.kernels.decode_attention.hopper import launch as hopper
from palu.kernels.head_rotation import kernel as rotation
from palu.kernels.head_rotation.op import launch_rotation
from palu.kernels.latent_scores import launch as scores
from palu.kernels.latent_scores import tables
from palu.kernels.latents import LatentProjection, MixedLatents
from palu.kernels.packing import packed_width
from palu.kernels.quantization import launch as quantization
from palu.kernels.quantize import PackedLatents, Quantization
from palu.kernels.rotation import Rotation

TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.bool: "*i1"}
TYPES |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
LENGTH, HEAD_DIM, VALUE_RANK = 40960, 128, 384
# Multiply-adds in what Triton writes and in what the assembler makes of it.
WRITTEN, KEPT = r"\b(?:fma\.rn|mul|fma)\.f32\b", r"\bF(?:FMA|MUL)\b"
# Bytes of shared memory that one block may have: A100, RTX 4090 and L40, H100 and H200.
MOST_SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Call(NamedTuple):
    """A call of decode attention with heads of 128; queries: tokens.

    beside: tokens kept exact beside the packed ones; key_rank: per group of group_size; joined: groups whose values
    have value_rank latents together; value_bits: where those of values are others.
    """

    kv_heads: int = 32
    bits: int = 16
    dtype: torch.dtype = torch.float16
    key_norm: bool = False
    absorbed: bool = False
    beside: int = 0
    bias: bool = False
    queries: int = 1
    key_rank: int = 128
    group_size: int = 4
    length: int = LENGTH
    heads: int = 32
    base: float | None = None
    mask: str | None = "bool"
    value_rank: int = VALUE_RANK
    joined: int = 1
    value_bits: int | None = None


CALLS = [Call(bits=bits) for bits in (16, 8, 4, 3)] + [Call(8, bits) for bits in (16, 4)]
CALLS += [Call(8, key_norm=True), Call(absorbed=True), Call(absorbed=True, bits=4), Call(dtype=torch.bfloat16)]
CALLS += [Call(bits=4, dtype=torch.bfloat16, beside=256), Call(8, 4, bias=True), Call(4, key_norm=True, heads=28)]
CALLS += [Call(key_rank=272), Call(key_rank=256), Call(8, 4, key_rank=256), Call(16, 16, group_size=1, base=1e5)]
CALLS += [Call(base=100.0), Call(key_rank=1024, absorbed=True)]
# For Hopper's kernel.
HOPPER_CALLS = [Call(kv, mask=mask) for kv, mask in ((32, None), (8, None), (8, "additive"))]
HOPPER_CALLS += [Call(kv, dtype=torch.bfloat16) for kv in (32, 8)] + [Call(8, dtype=torch.bfloat16, absorbed=True)]
HOPPER_CALLS += [Call(absorbed=True, bits=bits) for bits in (16, 8, 4)] + [Call(8, group_size=2)]
HOPPER_CALLS += [Call(4, group_size=2, heads=28), Call(group_size=1), Call(absorbed=True, group_size=32)]
HOPPER_CALLS += [Call(8, value_rank=512, key_rank=64), Call(8, value_rank=768, joined=2, mask=None)]
HOPPER_CALLS += [Call(kv, bits, mask=None) for kv in (32, 8) for bits in (8, 4)]
HOPPER_CALLS += [Call(group_size=1, bits=8, key_rank=256), Call(16, 4, group_size=2, heads=16)]
HOPPER_CALLS += [Call(4, 4, heads=28), Call(8, 4, group_size=1, mask=None)]
HOPPER_CALLS += [Call(8, bits, key_norm=True, mask=None) for bits in (16, 8)]
HOPPER_CALLS += [Call(4, 4, bias=True, heads=28, mask=None), Call(5, heads=10, group_size=5, key_rank=64, bias=True)]
# A tile for each program, two of which share a group's heads.
HOPPER_CALLS += [Call(8, bits, length=4096, bias=bits == 8) for bits in (16, 8)]
# More latents of keys than the factor of all of a group's heads leaves room for; values of all key groups together.
HOPPER_CALLS += [Call(kv, bits, key_rank=256, value_rank=256, mask=None) for kv in (32, 8) for bits in (16, 8)]
HOPPER_CALLS += [Call(32, key_rank=192, value_rank=320, mask=None), Call(8, key_rank=192, dtype=torch.bfloat16)]
HOPPER_CALLS += [Call(8, 4, key_rank=256, value_rank=512, joined=2, key_norm=True, bias=True)]
# Keys in groups of two, values of four or eight kv heads together: programs of two key groups, sections in windows.
HOPPER_CALLS += [Call(kv, bits, group_size=2, value_rank=256, joined=2, mask=None) for kv, bits in ((32, 4), (8, 8))]
HOPPER_CALLS += [Call(kv, bits, key_rank=192, group_size=2, joined=4, mask=None) for kv, bits in ((32, 8), (8, 16))]
HOPPER_CALLS += [Call(8, 4, group_size=2, value_rank=256, joined=2, key_norm=True, bias=True)]
HOPPER_CALLS += [Call(8, 4, group_size=1, key_rank=64, value_rank=256, joined=4, mask=None)]
HOPPER_CALLS += [Call(32, 4, group_size=2, key_rank=64, joined=4, mask=None)]
# Few bits: planes, copies of 16 and of 4 bytes, zero points with fractions. Exact tokens beside codes.
HOPPER_CALLS += [Call(32, 3, mask=None), Call(8, 2, mask=None), Call(absorbed=True, bits=3)]
HOPPER_CALLS += [Call(8, 3, key_rank=96, value_rank=352, bias=True, key_norm=True), Call(8, 3, key_rank=160, mask=None)]
HOPPER_CALLS += [Call(32, 2, key_rank=256, value_rank=256, mask=None)]
HOPPER_CALLS += [Call(bits=4, beside=130, absorbed=absorbed, mask=None) for absorbed in (False, True)]
HOPPER_CALLS += [Call(8, 4, torch.bfloat16, beside=130, mask=None)]
# Keys and values of different bits; more than 256 latents of keys.
HOPPER_CALLS += [Call(32, 4, value_bits=8, mask=None), Call(8, 3, value_bits=4, mask=None)]
HOPPER_CALLS += [Call(8, bits, key_rank=320, value_rank=320, mask=None) for bits in (16, 4)]
HOPPER_CALLS += [Call(32, 4, key_rank=320, value_rank=320, mask=None), Call(absorbed=True, bits=4, key_rank=512)]


class Launch(NamedTuple):
    """What tells one compilation from another."""

    name: str
    signature: tuple
    constants: tuple
    aligned: tuple[int, ...]
    options: tuple


class Recorder:
    """Stands in for a kernel; keeps what a launch would compile."""

    def __init__(self, function, launches):
        self.function, self.launches = function, launches

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **keywords):
        # As `relaunch` takes them.
        tensors = [isinstance(argument, torch.Tensor) for argument in args]
        assert tensors == sorted(tensors, reverse=True)
        options = tuple((name, keywords.pop(name)) for name in OPTIONS if name in keywords)
        values = dict(zip([parameter.name for parameter in self.function.params], args, strict=False)) | keywords
        if values.get("DTYPE") == tl.float16 and "ASSEMBLY" in values:
            # The launcher says so of tensors on a GPU only.
            values["ASSEMBLY"] = True
        signature, constants, aligned = {}, {}, []
        for index, parameter in enumerate(self.function.params):
            name, value = parameter.name, values[parameter.name]
            specialized = not parameter.do_not_specialize
            if parameter.is_constexpr or (type(value) is int and value == 1 and specialized):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                told = value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment
                aligned += [index] if told else []
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                aligned += [index] if value % 16 == 0 and specialized else []
        kept = (tuple(each.items()) for each in (signature, constants))
        self.launches.setdefault(Launch(self.function.__name__, *kept, tuple(aligned), options), self.function)


def record(architecture):
    """The launches of all calls on a GPU of an architecture, each once, with their functions."""
    launches = {}
    modules = (attention, scores, parts, tables, hopper, hopper_kind, quantization, rotation)
    for module in modules:
        module.block_memory = lambda device: MOST_SHARED[architecture]
        module.processors = lambda device: 132
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(value, "params"):
                setattr(module, name, Recorder(value, launches))
    # Also where there is a Hopper kernel, others take what it does not.
    attention.runs_hopper_kernel = lambda device: False
    record_beside(torch.float16)
    record_beside(torch.bfloat16)
    record_growing(launches)
    for call in CALLS:
        attention.decode_attention(*arguments(call))
    if architecture == 90:
        attention.runs_hopper_kernel = lambda device: True
        for call in HOPPER_CALLS:
            attention.decode_attention(*arguments(call))
        record_combining()
    return launches


def record_beside(dtype):
    """What comes before and after decode attention: codes of new tokens, numbers of codes, turned heads."""
    ranks, slots = (VALUE_RANK,) * 8, torch.arange(64)
    latents = torch.empty(1, 64, sum(ranks), dtype=dtype)
    for bits in (8, 4, 3, 2):
        for symmetric in (False, True):
            settings = Quantization(bits, ranks, symmetric)
            packed = PackedLatents.of(*quantization.launch_encode(latents, settings), settings)
            quantization.launch_encode_into(packed.codes, packed.parameters, latents, settings, slots)
            quantization.launch_dequantized(packed, dtype, range(len(ranks)))
    for head_dim in (64, 96, 128):
        tables_ = torch.empty(2, 1, 64, head_dim, dtype=dtype)
        launch_rotation(torch.empty(1, 64, 8, head_dim, dtype=dtype).transpose(1, 2), *tables_)


def record_combining():
    """Rows of which the programs that add parts up have a multiprocessor each, and do not."""
    for rows, rank in ((2, 384), (4, 384), (8, 384), (6, 512), (1, 768), (6, 768)):
        means = hopper.Means(torch.empty(16, rows, 32, rank, dtype=torch.float16), torch.empty(16, rows, 32))
        value = LatentProjection(torch.empty(4 * HEAD_DIM, 2 * rank, dtype=torch.float16), (rank, rank))
        query = torch.empty(rows, 32, HEAD_DIM, dtype=torch.float16)
        hopper._combine_early(means, value, query, HEAD_DIM)
    # More latents than that launch takes, and none of the up factor.
    for rank, up in ((896, torch.empty(4 * HEAD_DIM, 1792, dtype=torch.float16)), (384, None)):
        means = hopper.Means(torch.empty(16, 1, 32, rank, dtype=torch.float16), torch.empty(16, 1, 32))
        query = torch.empty(1, 32, HEAD_DIM, dtype=torch.float16)
        hopper._combine_early(means, LatentProjection(up, (rank, rank)), query, HEAD_DIM)


def record_growing(launches):
    """New tokens' codes behind those of a cache, aligned or not, take the same code."""
    for ranks in ((384, 384), (48, 48), (16,)):
        settings, latents = Quantization(4, ranks), torch.empty(1, 1, sum(ranks), dtype=torch.float16)
        held = (settings.packed_width, torch.uint8), (settings.parameter_count, torch.float16)
        storages = [torch.empty(1, 99, width, dtype=each) for width, each in held]
        before = len(launches)
        for slot in range(99):
            quantization.launch_encode_into(*(each[:, slot : slot + 1] for each in storages), latents, settings)
        assert len(launches) == before + 1
        # As others, which are compiled.
        launches.popitem()


def arguments(call):
    """Arguments of a call, with memory that nobody touches for latents."""
    groups, width = call.kv_heads // call.group_size, call.group_size * HEAD_DIM
    ranks = ((call.key_rank,) * groups, (call.value_rank,) * (groups // call.joined))
    bias = torch.zeros(call.kv_heads * HEAD_DIM, dtype=call.dtype) if call.bias else None
    key, value = (
        LatentProjection(torch.zeros(rows, sum(each), dtype=call.dtype), each, bias)
        for rows, each in zip((width, width * call.joined), ranks, strict=True)
    )
    frequencies = (call.base or (1e4 if call.kv_heads == 32 else 5e5)) ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    rotation = None if call.absorbed else Rotation(torch.arange(call.length)[None], frequencies)
    norm = SimpleNamespace(variance_epsilon=1e-6, weight=torch.ones(HEAD_DIM, dtype=call.dtype))
    query = torch.zeros(1, call.heads, call.queries, HEAD_DIM, dtype=call.dtype)
    bits = (call.bits, call.value_bits or call.bits)
    latents = [latents_of(call, *each) for each in zip(ranks, bits, strict=True)]
    kind = torch.bool if call.mask == "bool" else call.dtype
    mask = torch.ones(1, 1, call.queries, call.length, dtype=kind) if call.mask else None
    return query, *latents, key, value, rotation, mask, HEAD_DIM**-0.5, norm if call.key_norm else None


def latents_of(call, ranks, bits):
    if bits == 16:
        return torch.empty(1, call.length, sum(ranks), dtype=call.dtype)
    packed = call.length - call.beside
    codes = torch.empty(1, packed, packed_width(sum(ranks), bits), dtype=torch.uint8)
    parameters = torch.empty(1, packed, 2 * len(ranks), dtype=torch.float16)
    latents = PackedLatents.of(codes, parameters, Quantization(bits, ranks))
    if call.beside == 0:
        return latents
    return MixedLatents((latents, torch.empty(1, call.beside, sum(ranks), dtype=call.dtype)))


def told_of(main, beside):
    """What tells compilations of Hopper's kernel apart, by the names that others have for it."""
    if main is None:
        return {}
    told = {"MODE": main.exact.mode, "SPAN": main.windows.span if main.windows else 0, "BESIDE": beside is not None}
    return told | {name.upper(): value for name, value in main._asdict().items()}


def compiled(function, launch, architecture, folder):
    """What one launch takes on a GPU of an architecture."""
    constants = dict(launch.constants)
    told = constants | told_of(constants.get("MAIN"), constants.get("BESIDE"))
    names = ("MODE", "BITS", "QUERIES", "HAS_NORM", "HAS_BIAS", "STAGES", "PIECE", "FAST", "COLUMNS", "SPAN", "RANK")
    names += ("DTYPE", "SLOTS", "SECTIONS", "KEY_GROUPS", "CHUNKS", "BESIDE")
    row = {"kernel": launch.name} | {name.lower(): str(told[name]) for name in names if name in told}
    attributes = {(index,): [["tt.divisibility", 16]] for index in launch.aligned}
    language = GluonASTSource if function.is_gluon() else ASTSource
    source = language(function, signature=dict(launch.signature), constexprs=constants, attrs=attributes)
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options))
    except CompilationError as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return row | {"error": str(error)[-300:]}
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    row |= {"shared": kernel.metadata.shared, "warpgroup": "wgmma" in kernel.asm["ptx"]}
    # A product over fewer numbers than the matrix units add up, which Triton may make of a sum, is computed wrong.
    row["narrow"] = bool(re.search(r"tt\.dot .*tensor<\d+x[248]xf\d+, #ttg\.dot_op<{opIdx = 0", kernel.asm["ttgir"]))
    row |= {"asynchronous": "cp.async" in kernel.asm["ptx"], "registers": int(re.search(r"REG:(\d+)", usage)[1])}
    if function.is_gluon():
        # Multiply-adds that the assembler drops because it takes results of different products for the same.
        code = subprocess.run([TOOLS / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
        written, kept = (len(re.findall(what, text)) for what, text in ((WRITTEN, kernel.asm["ptx"]), (KEPT, code)))
        row |= {"written": written, "dropped": written - kept, "overwritten": overwritten(code)}
    row["spilled"] = max(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    return row


def overwritten(code):
    """Instructions that write registers which a product that is under way may still read its left side from."""
    groups, current, found = [], set(), []
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?(.*?);", code):
        opcode, *rest = instruction.split(None, 1)
        arguments = [each.strip() for each in "".join(rest).split(",")]
        if "GMMA" in opcode:
            left = re.fullmatch(r"R(\d+)", arguments[1])
            current |= set(range(int(left[1]), int(left[1]) + 4)) if left else set()
            if "gsb0" in instruction:
                groups, current = [*groups, current], set()
        elif "DEPBAR" in opcode and "gsb0" in instruction:
            left_over = int(re.search(r"gsb0, (0x[0-9a-f]+)", instruction)[1], 16)
            groups = groups[len(groups) - left_over :] if left_over else []
        elif (target := re.fullmatch(r"R(\d+)", arguments[0])) and not opcode.startswith(
            ("ST", "RED", "BAR", "LDGSTS")
        ):
            wide = 4 if ".128" in opcode or opcode.endswith(".4") else 2 if ".64" in opcode or "WIDE" in opcode else 1
            written = set(range(int(target[1]), int(target[1]) + wide))
            found += [instruction] if written & current.union(*groups) else []
    return found


if __name__ == "__main__":
    half = slice(int(sys.argv[3]), None, 2) if len(sys.argv) > 3 else slice(None)
    for launch, function in list(record(int(sys.argv[1])).items())[half]:
        print(json.dumps(compiled(function, launch, int(sys.argv[1]), Path(sys.argv[2]))), flush=True)
