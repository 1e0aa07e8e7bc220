"""How heads, groups and latents lie in memory, as the launches of the kernels need to know it."""

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from palu.kernels.apart import made_apart
from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latents import Stretch
from palu.kernels.packing import last_plane
from palu.kernels.quantize import PackedLatents

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# kv heads, with one query head each or with several, and query heads, whose scores one program computes at most; of
# blocks of at least so many bytes of shared memory (H100, H200), and of smaller ones; and slots of several queries at
# least, so that with the fewest columns no product is narrower than the matrix units take.
MOST_KV, MOST_SLOTS = {False: 4, True: 2}, 32
SMALL_KV, LARGE_BLOCK, LEAST_SLOTS = 2, 200 << 10, 4


class HeadBlocks(NamedTuple):
    """How query heads are shared out: blocks of `kv` kv heads with `query_slots` places for `queries` each.

    per_group: kv heads per group; slots: places per block in the scores; count: blocks in all.
    """

    per_group: int
    kv: int
    queries: int
    query_slots: int
    slots: int
    count: int


class Side(NamedTuple):
    """Ranks, first latents, first bytes and first bytes of the high plane of every group, int32 on the device."""

    rank: Tensor
    offset: Tensor
    byte: Tensor
    plane: Tensor


def head_blocks(heads_per_group: int, groups: int, queries: int, memory: int) -> HeadBlocks:
    """Blocks for groups of kv heads with `queries` query heads each, on a device with so much memory per block."""
    most = MOST_KV[queries > 1] if memory >= LARGE_BLOCK else SMALL_KV
    query_slots = next_power_of_2(queries)
    kv = max(1, min(most, next_power_of_2(heads_per_group), MOST_SLOTS // query_slots))
    if queries > 1 and kv * query_slots < LEAST_SLOTS:
        query_slots = LEAST_SLOTS
    count = cdiv(heads_per_group, kv) * groups
    return HeadBlocks(heads_per_group, kv, queries, query_slots, max(8, kv * query_slots), count)


@functools.lru_cache(maxsize=4096)
def side_of(ranks: tuple[int, ...], bits: int, device: torch.device) -> Side:
    """The groups' places, made once per device. A plane of b bits begins behind ceil(width b / 8) bytes."""
    offsets = [sum(ranks[:group]) for group in range(len(ranks))]
    plane_bits = 2 if bits == 3 else bits
    bytes_ = [offset * plane_bits // 8 if bits < 16 else offset for offset in offsets]
    planes = [last_plane(sum(ranks), bits) + offset // 8 if bits == 3 else 0 for offset in offsets]
    numbers = (ranks, offsets, bytes_, planes)
    return made_apart(device, lambda: Side(*(torch.tensor(each, dtype=torch.int32, device=device) for each in numbers)))


@functools.cache
def divisor(ranks: tuple[int, ...]) -> int:
    """The largest power of two, 16 to 128, of which all ranks are multiples."""
    return next(size for size in (128, 64, 32, 16) if all(rank % size == 0 for rank in ranks))


@functools.cache
def even_rank(ranks: tuple[int, ...]) -> int:
    """The rank of all groups, 0 where they differ."""
    return ranks[0] if len(set(ranks)) == 1 else 0


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def block_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; plenty where the kernels are interpreted."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def layout(part: Stretch) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int, int], int, bool]:
    """Latents or codes, and scales; strides per row and token of both; bits; whether there are zero points."""
    if not isinstance(part, PackedLatents):
        return (part, part), (part.stride(0), part.stride(1), 0, 0), 16, False
    strides = (*part.codes.stride()[:2], *part.scales.stride()[:2])
    return (part.codes, part.scales), strides, part.quantization.bits, part.zeros is not None


def mask_kind(mask: Tensor | None) -> str:
    """What the kernels call a mask."""
    return "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"


def row_strides(table: Tensor) -> tuple[int, int]:
    """Strides per row and token of [rows or 1, length, ...]."""
    return (table.stride(0) if table.shape[0] > 1 else 0, table.stride(1))
