"""Launches the kernels of decode attention: what they can take, their grids, their buffers."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from palu.kernels.apart import made_apart
from palu.kernels.decode_attention.kernel import softmax_kernel, values_kernel
from palu.kernels.decode_attention.parts import Parts, combine
from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latent_scores.launch import Scores, compute_dtype, launch_scores
from palu.kernels.latent_scores.layout import DTYPES, block_memory, divisor, layout, processors, side_of
from palu.kernels.latent_scores.op import absorbed
from palu.kernels.latents import LatentProjection, Latents, MixedLatents, Stretch, stretches
from palu.kernels.quantize import PackedLatents
from palu.kernels.relaunch import relaunch
from palu.kernels.rotation import Rotation
from palu.kernels.tuning import length_class, pick, searches

HEAD_DIMS = (64, 96, 128)
# Versions of Triton, first and last, whose Gluon compiles the kernel for Hopper.
GLUON = ((3, 6), (3, 9))
RANK_MULTIPLE = 16
# Shared memory that a block needs for rotated keys in float32.
FLOAT32_BLOCK = 160 << 10
TILE = 64
# Tokens of a part at most: one program makes weights of them.
MOST_PART = 4096
# Scores that a program makes weights of at most, and each of its warps.
SOFTMAX_BLOCK, SOFTMAX_WARP = 16384, 1024


class Config(NamedTuple):
    """How the value kernel is launched: programs per multiprocessor, tiles under way."""

    programs: int
    stages: int


# Measured on one H200. Partial sums of many heads cost more, so fewer of them are made.
CONFIGS = {"numbers": Config(6, 3), "codes": Config(3, 4), "many heads": Config(2, 3)}
MANY_HEADS = 16
# What the full search tries.
GRID = tuple(Config(*each) for each in itertools.product((1, 2, 3, 4, 6, 8), (2, 3, 4, 5)))


def can_take(
    query: Tensor, key_latents: Latents, value_latents: Latents, key: LatentProjection, value: LatentProjection,
    rotation: Rotation | None, mask: Tensor | None, key_norm: Any,
) -> bool:  # fmt: skip
    """Whether the kernels can compute this call; the reference does the others."""
    aligned = _are_aligned(tuple(key.ranks)) and _are_aligned(tuple(value.ranks))
    shapes = query.shape[-1] in HEAD_DIMS if key.up is not None else True
    shapes = shapes and query.dtype in DTYPES and aligned
    if query.dtype == torch.float32 and key.up is not None:
        shapes = shapes and block_memory(query.device) >= FLOAT32_BLOCK
    no_gradient = not (torch.is_grad_enabled() and query.requires_grad)
    one_mask_per_row = mask is None or mask.shape[1] == 1
    known_norm = key_norm is None or (hasattr(key_norm, "variance_epsilon") and rotation is not None)
    sides = ((key_latents, key), (value_latents, value))
    plain = all(_is_plain(part, side.ranks, query.dtype) for latents, side in sides for part in stretches(latents))
    return shapes and no_gradient and one_mask_per_row and known_norm and plain


@functools.cache
def _are_aligned(ranks: tuple[int, ...]) -> bool:
    """Whether all ranks are multiples of what the kernels compute at least."""
    return all(rank % RANK_MULTIPLE == 0 for rank in ranks)


def _is_plain(latents: Stretch, ranks: Sequence[int], dtype: torch.dtype) -> bool:
    """Codes with one scale per head group in whole words or with more scales, or latents of the query's dtype."""
    if isinstance(latents, PackedLatents) and latents.quantization.scales_whole(ranks):
        # Scales of neighbouring groups side by side, with their zero points between them if there are any.
        step = 1 if latents.zeros is None else 2
        aligned = latents.scales.shape[-1] == 1 or latents.scales.stride(-1) == step
        aligned = aligned and (latents.zeros is None or side_by_side(latents.scales, latents.zeros))
        unit = 2 if latents.quantization.bits == 3 else 4
        words = latents.codes.stride(-1) == 1 and all(stride % unit == 0 for stride in latents.codes.stride()[:2])
        return aligned and words
    if isinstance(latents, PackedLatents):
        # Those with more scales become numbers first.
        return True
    return latents.dtype == dtype and latents.stride(-1) == 1


def side_by_side(scales: Tensor, zeros: Tensor) -> bool:
    """Whether each zero point stands right behind its scale, both in one aligned word."""
    even = all(stride % 2 == 0 for stride in scales.stride()) and scales.data_ptr() % 4 == 0
    return even and scales.stride() == zeros.stride() and zeros.data_ptr() - scales.data_ptr() == scales.itemsize


@functools.cache
def runs_hopper_kernel(device: torch.device) -> bool:
    """Whether the device has the matrix units of compute capability 9, and Triton the language to use them."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if device.type != "cuda" or torch.version.hip or not GLUON[0] <= version <= GLUON[1]:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def decode_attention(
    query: Tensor,
    key_latents: Latents,
    value_latents: Latents,
    key: LatentProjection,
    value: LatentProjection,
    rotation: Rotation | None,
    mask: Tensor | None,
    scaling: float,
    key_norm: Any = None,
    head_dim: int | None = None,
) -> Tensor:
    """As the reference, without the probabilities: [batch, queries, features]."""
    key_latents, value_latents = _readable(key_latents, key, query), _readable(value_latents, value, query)
    if rotation is None and key.up is not None:
        query, key, head_dim = *absorbed(query, key), query.shape[-1]
    batch, num_heads, queries, width = query.shape
    rows = query.transpose(1, 2).contiguous().view(batch * queries, num_heads, width)
    visible = None
    if mask is not None:
        visible = mask[:, 0] if mask.shape[0] == 1 and queries == 1 else mask[:, 0].expand(batch, -1, -1)
        visible = visible.reshape(-1, mask.shape[-1])
    output = _launch_hopper(
        query, rows, key_latents, value_latents, key, value, rotation, visible, scaling, head_dim or width, key_norm
    )
    if output is None:
        scores = launch_scores(rows, key_latents, key, rotation, visible, queries, scaling, key_norm)
        parts = launch_values(scores, value_latents, value, rows, queries, len(key.ranks))
        output = combine(parts, value, rows, head_dim or width)
    return output.view(batch, queries, -1)


def _readable(latents: Latents, side: LatentProjection, query: Tensor) -> Latents:
    """The same, but that codes with more than one scale per head group are numbers, made for this call."""
    parts = [
        part.dequantized(query.dtype)
        if isinstance(part, PackedLatents) and not part.quantization.scales_whole(side.ranks)
        else part
        for part in stretches(latents)
    ]
    return MixedLatents(tuple(parts)) if isinstance(latents, MixedLatents) else parts[0]


def _launch_hopper(
    query: Tensor, rows: Tensor, key_latents: Latents, value_latents: Latents, key: LatentProjection,
    value: LatentProjection, rotation: Rotation | None, mask: Tensor | None, scaling: float, head_dim: int,
    key_norm: Any,
) -> Tensor | None:  # fmt: skip
    """Heads' outputs by the kernel for Hopper; None where there is none that takes this call.

    query: [batch, num_heads, queries, width]; rows: the same, [batch * queries, num_heads, width].
    """
    if not runs_hopper_kernel(query.device) or not (rotation is None or rotation.groups == 1):
        return None
    # Here, so that other GPUs and other versions need no Gluon.
    from palu.kernels.decode_attention.hopper.kind import stretches_of
    from palu.kernels.decode_attention.hopper.launch import launch as launch_hopper

    call = (key_latents, value_latents, key, value)
    found = stretches_of(query, *call, mask, key_norm)
    return None if found is None else launch_hopper(found, rows, *call, rotation, mask, scaling, head_dim, key_norm)


def launch_values(
    scores: Scores, latents: Latents, value: LatentProjection, query: Tensor, rows_per_latent: int, key_groups: int
) -> Parts:
    """Weighted sums of the value latents over ranges of tokens."""
    per_group = query.shape[1] // len(value.ranks)
    packed = any(isinstance(part, PackedLatents) for part in stretches(latents))
    first = CONFIGS["many heads" if per_group >= MANY_HEADS else "codes" if packed else "numbers"]
    call = (scores, latents, value, query, rows_per_latent, key_groups)
    if not searches():
        return _launch_values(first, *call)
    kinds = tuple(layout(part)[2:] for part in stretches(latents))
    config = pick(
        ("values", query.shape, tuple(value.ranks), kinds, query.dtype, length_class(latents.shape[1])),
        tuple(dict.fromkeys((first, *GRID))), lambda config: _launch_values(config, *call), query.device,
    )  # fmt: skip
    return _launch_values(config, *call)


def _launch_values(
    config: Config, scores: Scores, latents: Latents, value: LatentProjection, query: Tensor, rows_per_latent: int,
    key_groups: int,
) -> Parts:  # fmt: skip
    rows, num_heads, _ = query.shape
    heads, device = scores.heads, query.device
    stretches_ = stretches(latents)
    ranks = tuple(value.ranks)
    plan = _chunks(ranks, device)
    per_group = num_heads // len(ranks)
    programs = max(1, config.programs * processors(device) // (rows * len(stretches_) * len(plan.group)))
    tokens = [_part_tokens(part.shape[1], programs) for part in stretches_]
    counts = [cdiv(part.shape[1], most) for part, most in zip(stretches_, tokens, strict=True)]
    sums = query.new_empty(sum(counts), rows, num_heads, max(ranks), dtype=torch.float32)
    totals, peaks, shifts = query.new_empty(3, sum(counts), rows, num_heads, dtype=torch.float32)
    weights = query.new_empty(rows, num_heads, scores.scores.shape[3], dtype=compute_dtype(query, stretches_))
    start = 0
    for index, part in enumerate(stretches_):
        tensors, strides, bits, asymmetric = layout(part)
        shared = {
            "HEADS": num_heads, "HEADS_PER_GROUP": per_group, "QUERY_ROWS": rows_per_latent, "BITS": bits,
            "ASYMMETRIC": asymmetric, "TILE": TILE,
        }  # fmt: skip
        numbers = (scores.scores.shape[3], start // TILE, tokens[index] // TILE, sum(counts[:index]), rows * num_heads)
        span = next_power_of_2(tokens[index])
        at_once = min(next_power_of_2(per_group), max(1, SOFTMAX_BLOCK // span))
        relaunch(
            softmax_kernel, (counts[index], len(ranks) * cdiv(per_group, at_once), rows),
            scores.scores, tensors[1], weights, totals, peaks, shifts, part.shape[1], *strides[2:], *numbers,
            HEAD_BLOCKS=heads.count, KEY_GROUP=num_heads // key_groups, KV=heads.kv, QUERY_SLOTS=heads.query_slots,
            QUERIES=heads.queries, SLOTS=heads.slots, RANGE=span,
            AT_ONCE=at_once, num_warps=max(4, min(16, at_once * span // SOFTMAX_WARP)), **shared,
        )  # fmt: skip
        relaunch(
            values_kernel, (len(plan.group), counts[index], rows),
            weights, tensors[0], sums, peaks, shifts, *_places(ranks, bits, device), plan.group, plan.column,
            part.shape[1], *strides[:2], *numbers,
            BLOCK_HEADS=max(16, next_power_of_2(per_group)), RANK_STRIDE=max(ranks), DTYPE=DTYPES[weights.dtype],
            ASSEMBLY=weights.dtype == torch.float16 and query.is_cuda, DIVISOR=divisor(ranks), BLOCK_RANK=plan.size,
            STAGES=config.stages, **shared,
        )  # fmt: skip
        start += cdiv(part.shape[1], scores.piece) * scores.piece
    return Parts(sums, totals, peaks)


def _part_tokens(length: int, programs: int) -> int:
    """Tokens of a part, so that so many programs, or a little less, share the length: whole tiles."""
    return min(MOST_PART, cdiv(cdiv(length, programs), TILE) * TILE)


def _places(ranks: tuple[int, ...], bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    side = side_of(ranks, bits, device)
    return side.rank, side.byte, side.plane


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
    both = tuple(zip(*chunks, strict=True))
    return Chunks(
        size, *made_apart(device, lambda: [torch.tensor(each, dtype=torch.int32, device=device) for each in both])
    )
