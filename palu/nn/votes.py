"""The attention that the newest queries pay to cached tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from palu.kernels.latent_scores.reference import latent_scores
from palu.kernels.latents import LatentProjection, Latents
from palu.kernels.reconstruct.op import reconstruct
from palu.kernels.rotation import Rotation


def attention_votes(
    query: Tensor,
    latents: Latents,
    key: LatentProjection,
    rotation: Rotation,
    visible: Tensor | None,
    scaling: float,
    key_norm: Callable[[Tensor], Tensor] | None,
    groups: int,
) -> Tensor:
    """Probabilities of every token, summed over queries and averaged over a token group's heads (SnapKV, arXiv
    2404.14469, equation 1).

    Args:
        query: of the newest tokens, rotated, [batch, num_heads, queries, head_dim].
        latents: of all cached tokens, those of the queries last.
        visible: what each query may attend to, bool [batch, 1 or groups, queries, length]; None: all.
        groups: of heads, consecutive and equal.

    Returns:
        float32 [batch, groups, length].
    """
    scores = latent_scores(query * scaling, latents, key, rotation, key_norm, reconstruct)
    scores = scores.float().unflatten(1, (groups, -1))
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    return torch.softmax(scores, dim=-1).sum(dim=3).mean(dim=2)
