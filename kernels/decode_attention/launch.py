"""Launches the Triton kernels of decode attention: what they can take, their grids, their buffers."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu.kernels.decode_attention.kernel import combine_kernel, scores_kernel, values_kernel
from palu.kernels.decode_attention.reference import LatentProjection, expand_values
from palu.kernels.latents import Latents, Stretch, stretches
from palu.kernels.quantize import PackedLatents

LOG2_E = 1.4426950408889634
HEAD_DIMS = (64, 96, 128)
RANK_MULTIPLE = 16
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
SCORES_BLOCK = 64
# A program of the score kernel keeps its head's up factor for so many blocks of tokens at most.
MOST_BLOCKS = 32
COMBINE_BLOCK = 128
LARGEST_KEPT_RANK = 128
VALUES_BLOCK = 64
PEAKS_BLOCK = 256
# Programs of the value kernel per multiprocessor: enough to hide the latency of loads.
PROGRAMS_PER_PROCESSOR = 4


def can_take(
    query: Tensor, key_latents: Latents, value_latents: Latents, key: LatentProjection, value: LatentProjection,
    mask: Tensor | None, key_norm: Any,
) -> bool:  # fmt: skip
    """Whether the kernels can compute this call; the reference does the others."""
    aligned = all(rank % RANK_MULTIPLE == 0 for rank in (*key.ranks, *value.ranks))
    shapes = query.shape[-1] in HEAD_DIMS and query.dtype in DTYPES and aligned
    no_gradient = not (torch.is_grad_enabled() and query.requires_grad)
    one_mask_per_row = mask is None or mask.shape[1] == 1
    known_norm = key_norm is None or hasattr(key_norm, "variance_epsilon")
    sides = ((key_latents, key), (value_latents, value))
    plain = all(_is_plain(part, side.ranks, query.dtype) for latents, side in sides for part in stretches(latents))
    return shapes and no_gradient and one_mask_per_row and known_norm and plain


def _is_plain(latents: Stretch, ranks: Sequence[int], dtype: torch.dtype) -> bool:
    """Codes with one scale per head group, or latents of the query's dtype, each token's side by side."""
    if isinstance(latents, PackedLatents):
        aligned = latents.zeros is None or latents.zeros.stride() == latents.scales.stride()
        return aligned and latents.quantization.widths == tuple(ranks) and latents.codes.stride(-1) == 1
    return latents.dtype == dtype and latents.stride(-1) == 1


# Compiled models call it as it is: the launches have nothing that a compiler could improve.
@torch.compiler.disable
def decode_attention(
    query: Tensor,
    key_latents: Latents,
    value_latents: Latents,
    key: LatentProjection,
    value: LatentProjection,
    rotation: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scaling: float,
    key_norm: Any = None,
) -> Tensor:
    """As the reference, without the probabilities: [batch, queries, num_heads * head_dim]."""
    outputs = []
    for index in range(query.shape[2]):
        one = (query[:, :, index] * (scaling * LOG2_E)).contiguous()
        visible = None if mask is None else mask[:, 0, index]
        scores, peaks = _scores(one, key_latents, key, rotation, visible, key_norm)
        outputs.append(_values(scores, peaks, value_latents, value, one))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _scores(
    query: Tensor, latents: Latents, key: LatentProjection, rotation: tuple[Tensor, Tensor], mask: Tensor | None,
    key_norm: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores float32 [batch, num_heads, length] as base-2 logarithms, and their maxima over blocks of tokens."""
    batch, num_heads, head_dim = query.shape
    kv_heads = key.up.shape[0] * len(key.ranks) // head_dim
    parts = stretches(latents)
    blocks = [triton.cdiv(part.shape[1], SCORES_BLOCK) for part in parts]
    # Rows of scores start at multiples of 16, so that one compiled kernel serves every length.
    padded = triton.cdiv(latents.shape[1], SCORES_BLOCK) * SCORES_BLOCK
    scores = query.new_empty(batch, num_heads, padded, dtype=torch.float32)
    peaks = query.new_empty(batch, num_heads, sum(blocks), dtype=torch.float32)
    rank_of, offset_of = _groups(tuple(key.ranks), query.device)
    half = triton.next_power_of_2(head_dim // 2)
    queries = num_heads // kv_heads
    # Up factors of larger ranks do not stay in shared memory; smaller pieces of them fit beside the latents.
    block_rank = max(16, triton.next_power_of_2(max(key.ranks)))
    block_rank = block_rank if block_rank <= LARGEST_KEPT_RANK else 64
    start = 0
    for index, part in enumerate(parts):
        tensors, strides, bits, asymmetric = _layout(part)
        cos, sin = (table.narrow(1, start, part.shape[1]) for table in rotation)
        visible = None if mask is None else mask.narrow(1, start, part.shape[1])
        per_program = max(1, min(MOST_BLOCKS, blocks[index] * kv_heads * batch // (2 * _processors(query.device))))
        scores_kernel[(triton.cdiv(blocks[index], per_program), kv_heads, batch)](
            query, *tensors, key.up, key.up if key.bias is None else key.bias,
            key.up if key_norm is None else key_norm.weight, cos, sin, cos if visible is None else visible,
            scores, peaks, rank_of, offset_of, part.shape[1], *strides, key.up.stride(0),
            cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
            0 if visible is None or visible.shape[0] == 1 else visible.stride(0),
            0 if visible is None else visible.stride(1),
            scores.shape[2], start, sum(blocks[:index]), peaks.shape[2], per_program,
            0.0 if key_norm is None else key_norm.variance_epsilon,
            HEAD_DIM=head_dim, HALF=half, QUERIES=queries, BLOCK_QUERIES=max(16, triton.next_power_of_2(queries)),
            KV_HEADS=kv_heads, HEADS_PER_GROUP=kv_heads // len(key.ranks), WIDTH=part.shape[2], BITS=bits,
            ASYMMETRIC=asymmetric, HAS_BIAS=key.bias is not None, HAS_NORM=key_norm is not None,
            MASK="none" if visible is None else "bool" if visible.dtype == torch.bool else "additive",
            BLOCK_RANK=block_rank, CHUNKS=triton.cdiv(max(key.ranks), block_rank), BLOCK=SCORES_BLOCK, STAGES=2,
            DIVISOR=_divisor(tuple(key.ranks)),
        )  # fmt: skip
        start += part.shape[1]
    return scores, peaks


def _values(scores: Tensor, peaks: Tensor, latents: Latents, value: LatentProjection, query: Tensor) -> Tensor:
    """The heads' outputs, [batch, 1, num_heads * head_dim]."""
    batch, num_heads, length = scores.shape
    parts = stretches(latents)
    stride = max(value.ranks)
    rank_of, offset_of = _groups(tuple(value.ranks), query.device)
    plan = _chunks(tuple(value.ranks), query.device)
    blocks = [triton.cdiv(part.shape[1], VALUES_BLOCK) for part in parts]
    programs = PROGRAMS_PER_PROCESSOR * _processors(query.device) // (batch * len(parts))
    per_split = [triton.cdiv(count, min(count, max(1, programs // len(plan.group)))) for count in blocks]
    splits = [triton.cdiv(count, per) for count, per in zip(blocks, per_split, strict=True)]
    sums = query.new_empty(sum(splits), batch, num_heads, stride, dtype=torch.float32)
    totals = query.new_empty(sum(splits), batch, num_heads, dtype=torch.float32)
    heads = num_heads // len(value.ranks)
    start = 0
    for index, part in enumerate(parts):
        tensors, strides, bits, asymmetric = _layout(part)
        # Codes and weights are exact enough in fp16 whatever the model's format, and unpacked fastest to it.
        dtype = tl.float16 if bits < 16 and query.dtype != torch.float32 else DTYPES[query.dtype]
        values_kernel[(splits[index], len(plan.group), batch)](
            scores, peaks, *tensors, sums, totals, rank_of, offset_of, plan.group, plan.column,
            part.shape[1], *strides, length, start, peaks.shape[2], per_split[index], sum(splits[:index]),
            HEADS=num_heads, HEADS_PER_GROUP=heads, BLOCK_HEADS=max(16, triton.next_power_of_2(heads)),
            WIDTH=part.shape[2], RANK_STRIDE=stride, BITS=bits, ASYMMETRIC=asymmetric, DTYPE=dtype,
            ASSEMBLY=dtype == tl.float16 and query.is_cuda, DIVISOR=_divisor(tuple(value.ranks)),
            BLOCK_RANK=plan.size, BLOCK=VALUES_BLOCK, BLOCK_PEAKS=PEAKS_BLOCK,
        )  # fmt: skip
        start += part.shape[1]
    means = query.new_empty(batch, num_heads, stride)
    combine_kernel[(batch * num_heads, triton.cdiv(stride, COMBINE_BLOCK))](
        sums, totals, means, rank_of, sum(splits), batch * num_heads,
        HEADS=num_heads, HEADS_PER_GROUP=heads, RANK_STRIDE=stride, BLOCK_RANK=COMBINE_BLOCK,
    )  # fmt: skip
    by_group = means.view(batch, len(value.ranks), heads, 1, stride).unbind(1)
    groups = [mean[..., :rank] for mean, rank in zip(by_group, value.ranks, strict=True)]
    return expand_values(groups, value, query.shape[-1])


def _layout(part: Stretch) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int, int], int, bool]:
    """Latents or codes, scales and zeros; strides per row and token; bits; whether zero points are stored."""
    if not isinstance(part, PackedLatents):
        return (part, part, part), (part.stride(0), part.stride(1), 0, 0), 16, False
    zeros = part.scales if part.zeros is None else part.zeros
    strides = (*part.codes.stride()[:2], *part.scales.stride()[:2])
    return (part.codes, part.scales, zeros), strides, part.quantization.bits, part.zeros is not None


@functools.lru_cache(maxsize=4096)
def _groups(ranks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks and first latents of the groups, int32, made once per device."""
    with torch.inference_mode(False):
        offsets = [sum(ranks[:group]) for group in range(len(ranks))]
        return tuple(torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (ranks, offsets))


class Chunks(NamedTuple):
    """What the programs of the value kernel take on: `size` latents of a group each, from `column` on.

    group, column: int32 [programs].
    """

    size: int
    group: Tensor
    column: Tensor


@functools.lru_cache(maxsize=4096)
def _chunks(ranks: tuple[int, ...], device: torch.device) -> Chunks:
    """The chunks of a side, made once per device."""
    # The largest block of which the groups are multiples, so that none of it is masked off.
    size = next((size for size in (128, 64) if all(rank % size == 0 for rank in ranks)), 32)
    chunks = [(group, column) for group, rank in enumerate(ranks) for column in range(0, rank, size)]
    with torch.inference_mode(False):
        tensors = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in zip(*chunks, strict=True))
        return Chunks(size, *tensors)


@functools.cache
def _divisor(ranks: tuple[int, ...]) -> int:
    """The largest power of two, 16 to 128, of which all ranks are multiples."""
    return next(size for size in (128, 64, 32, RANK_MULTIPLE) if all(rank % size == 0 for rank in ranks))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
