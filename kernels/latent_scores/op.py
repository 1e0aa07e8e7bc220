"""Entry point of the op: shape checks and the choice of implementation."""

from collections.abc import Callable

import torch
from torch import Tensor

from palu.kernels.availability import uses_kernels
from palu.kernels.latent_scores.reference import latent_scores as reference_latent_scores
from palu.kernels.latents import LatentProjection, Latents, stretches
from palu.kernels.rotation import Rotation


def absorbed(query: Tensor, key: LatentProjection) -> tuple[Tensor, LatentProjection]:
    """A query multiplied with the key's up factor, [batch, num_heads, queries, largest rank], and the key without it.

    Scores are the same without a rotation, up to what a bias adds to all of a head's, which a softmax does not see.
    """
    batch, num_heads, queries, head_dim = query.shape
    largest, per_group = max(key.ranks), num_heads // len(key.ranks)
    kv_heads = key.up.shape[0] // head_dim
    by_group = query.view(batch, len(key.ranks), kv_heads, per_group // kv_heads * queries, head_dim)
    parts, offset = [], 0
    for group, rank in enumerate(key.ranks):
        up = key.up[:, offset : offset + rank].unflatten(0, (kv_heads, head_dim))
        part = (by_group[:, group] @ up).view(batch, per_group, queries, rank)
        parts.append(torch.nn.functional.pad(part, (0, largest - rank)))
        offset += rank
    return torch.cat(parts, dim=1), LatentProjection(None, key.ranks)


def latent_scores(
    query: Tensor,
    latents: Latents,
    key: LatentProjection,
    rotation: Rotation | None,
    key_norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Scores of queries against latents, [batch, num_heads, queries, length]; arguments as in the reference.

    Triton computes them in float32 on a GPU, the reference elsewhere in the query's dtype.

    Raises:
        ValueError: if the latents' width does not match the ranks.
    """
    if latents.shape[-1] != sum(key.ranks):
        raise ValueError(f"key latents are {latents.shape[-1]} wide, the ranks {list(key.ranks)} need a sum of that")
    if not uses_kernels(query):
        return reference_latent_scores(query, latents, key, rotation, key_norm)
    from palu.kernels.latent_scores.launch import LOG2_E, launch_scores

    batch, num_heads, queries, width = query.shape
    rows = query.transpose(1, 2).contiguous().view(batch * queries, num_heads, width)
    found = launch_scores(rows, latents, key, rotation, None, queries, 1.0, key_norm)
    scores = found.by_head(num_heads, [part.shape[1] for part in stretches(latents)]) / LOG2_E
    return scores.view(batch, queries, num_heads, -1).transpose(1, 2)
