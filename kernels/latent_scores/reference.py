"""Scores of rotated queries against key latents: the plain PyTorch definition."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palu.kernels.latents import LatentProjection, Latents, Stretch, blocks
from palu.kernels.quantize import PackedLatents
from palu.kernels.reconstruct.reference import BLOCK_LENGTH, reconstruct
from palu.kernels.rotation import Rotation, rotate


def latent_scores(
    query: Tensor,
    latents: Latents,
    key: LatentProjection,
    rotation: Rotation | None,
    key_norm: Callable[[Tensor], Tensor] | None = None,
    rebuild: Callable[..., Tensor] = reconstruct,
) -> Tensor:
    """`q . RoPE_t(norm(B x_t + b))` for every cached token t (Palu, section 3.2), a block of tokens at a time.

    Args:
        query: [batch, num_heads, queries, head_dim], rotated and scaled; without a key up factor already multiplied
            with it (absorbed; no rotation then), [batch, num_heads, queries, largest rank].
        latents: [batch, length, sum(ranks)], of any kind.
        key: the up side of the keys.
        rotation: the cached positions, or None: no rotation.
        key_norm: applied to rebuilt keys [..., head_dim] before the rotation (Qwen3), or None.
        rebuild: what makes full keys of latents, as `reconstruct`.

    Returns:
        [batch, num_heads, queries, length] of the query's dtype.
    """
    scores = []
    for start, block in blocks(latents, BLOCK_LENGTH):
        turn = None if rotation is None else rotation.narrow(start, block.shape[1])
        scores.append(_block_scores(query, block, key, turn, key_norm, rebuild))
    return torch.cat(scores, dim=-1)


def _block_scores(
    query: Tensor,
    latents: Stretch,
    key: LatentProjection,
    rotation: Rotation | None,
    key_norm: Callable[[Tensor], Tensor] | None,
    rebuild: Callable[..., Tensor],
) -> Tensor:
    """Scores of one block of tokens, [batch, num_heads, queries, block]."""
    if key.up is None:
        return _absorbed_scores(query, latents, key.ranks)
    batch, num_heads, queries, head_dim = query.shape
    keys = rebuild(latents, key.up, key.ranks, key.bias)
    keys = keys.view(batch, latents.shape[1], -1, head_dim)
    if key_norm is not None:
        keys = key_norm(keys)
    keys = keys.transpose(1, 2)
    if rotation is not None:
        keys = rotate(keys, *rotation.by_head(query.dtype, keys.shape[1]))
    num_kv_heads = keys.shape[1]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)
    return (grouped @ keys.transpose(-1, -2)).view(batch, num_heads, queries, -1)


def _absorbed_scores(query: Tensor, latents: Stretch, ranks: Sequence[int]) -> Tensor:
    """Every head's query meets the latents of its group; packed ones as `s (q . c - z q . 1)`."""
    batch, num_heads, queries, _ = query.shape
    by_group = query.view(batch, len(ranks), -1, query.shape[-1])
    scores, offset = [], 0
    for group, rank in enumerate(ranks):
        part = by_group[:, group, :, :rank]
        if isinstance(latents, PackedLatents):
            scores.append(_packed_scores(part, latents, latents.pieces(ranks)[group]))
        else:
            scores.append(part @ latents[..., offset : offset + rank].mT)
        offset += rank
    return torch.stack(scores, dim=1).view(batch, num_heads, queries, -1)


def _packed_scores(query: Tensor, packed: PackedLatents, pieces: Sequence[tuple[int, int, int]]) -> Tensor:
    """[batch, rows, tokens] from queries [batch, rows, rank]; the products are of codes less the middle one."""
    precise = torch.promote_types(query.dtype, torch.float32)
    shifts = packed.shifts()
    total, column = None, 0
    for index, offset, width in pieces:
        part = query[..., column : column + width].to(precise)
        product = part @ packed.centred(precise, offset, width).mT
        if shifts is not None:
            product = product - part.sum(-1, keepdim=True) * shifts[:, None, :, index].to(precise)
        product = product * packed.scales[:, None, :, index].to(precise)
        total = product if total is None else total + product
        column += width
    return total.to(query.dtype)
