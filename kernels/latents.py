"""Latents as a cache hands them out: as they are, as codes, or stretches of tokens of both kinds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palu.kernels.quantize import PackedLatents

Stretch = Tensor | PackedLatents


@dataclass(frozen=True)
class LatentProjection:
    """The up side of a low-rank projection.

    up: [group_dim, sum(ranks)], or None where it is folded into what comes after (values) or into the query (keys);
    bias: [num_kv_heads * head_dim] or None.
    """

    up: Tensor | None
    ranks: Sequence[int]
    bias: Tensor | None = None


@dataclass(frozen=True)
class MixedLatents:
    """Consecutive stretches of tokens, some exact [batch, length, width], some packed."""

    stretches: tuple[Stretch, ...]

    @property
    def shape(self) -> torch.Size:
        """[batch, length, width] of all stretches together."""
        batch, _, width = self.stretches[0].shape
        return torch.Size((batch, sum(stretch.shape[1] for stretch in self.stretches), width))


Latents = Stretch | MixedLatents


def version_of(tensor: Tensor) -> int | None:
    """A number that writing to a tensor changes; None of tensors that do not count."""
    return None if tensor.is_inference() else tensor._version


def stretches(latents: Latents) -> tuple[Stretch, ...]:
    """The stretches in the order of their tokens; one, where all tokens are of a kind."""
    return latents.stretches if isinstance(latents, MixedLatents) else (latents,)


def blocks(latents: Latents, length: int) -> Iterator[tuple[int, Stretch]]:
    """Pieces of at most `length` tokens, each of one kind, with the index of their first token."""
    offset = 0
    for stretch in stretches(latents):
        tokens = stretch.shape[1]
        for start in range(0, tokens, length):
            yield offset + start, stretch.narrow(1, start, min(length, tokens - start))
        offset += tokens


def dense(latents: Latents, dtype: torch.dtype, start: int = 0, count: int | None = None) -> Tensor:
    """Latents as numbers, [batch, length, count] from latent `start` on (all by default); codes with their rounding."""
    count = latents.shape[-1] - start if count is None else count
    parts = [
        part.dequantized(dtype, start, count)
        if isinstance(part, PackedLatents)
        else part[..., start : start + count].to(dtype)
        for part in stretches(latents)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
