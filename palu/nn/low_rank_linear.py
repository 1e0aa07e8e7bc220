"""A linear projection split into a cached down part and a per-group up part."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from palu.kernels.decode_attention.reference import LatentProjection
from palu.kernels.reconstruct.reference import reconstruct


class LowRankLinear(nn.Module):
    """`y_g = up_g (down_g x) + bias_g` for every group of heads g.

    Parameters: `down.weight` [sum(ranks), in_features]; `up` [group_dim, sum(ranks)], the groups side by side;
    `bias` [groups * group_dim] or None. Ranks may differ from group to group.
    """

    def __init__(self, in_features: int, out_features: int, ranks: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.out_features = out_features
        self.down = nn.Linear(in_features, sum(ranks), bias=False)
        self.up = nn.Parameter(torch.empty(out_features // len(ranks), sum(ranks)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.normal_(self.up, std=0.02)

    def latents(self, inputs: Tensor) -> Tensor:
        """What the cache holds: [batch, length, in_features] -> [batch, length, sum(ranks)]."""
        return self.down(inputs)

    def rebuild(self, latents: Tensor) -> Tensor:
        """[batch, length, sum(ranks)] -> [batch, length, out_features]."""
        return reconstruct(latents, self.up, self.ranks, self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """The projection itself: [batch, length, in_features] -> [batch, length, out_features]."""
        return self.rebuild(self.latents(inputs))

    @torch.no_grad()
    def turn_latents(self, turns: Sequence[Tensor]) -> None:
        """Change the basis of every group's latents, in place: `down <- T down`, `up <- up T^T`.

        Args:
            turns: one orthonormal [rank, rank] per group, float64.
        """
        device, dtype = self.up.device, self.up.dtype
        turns = [turn.to(device) for turn in turns]
        downs = self.down.weight.double().split(list(self.ranks))
        ups = self.up.double().split(list(self.ranks), dim=1)
        self.down.weight.copy_(torch.cat([turn @ down for turn, down in zip(turns, downs, strict=True)]).to(dtype))
        self.up.copy_(torch.cat([up @ turn.T for turn, up in zip(turns, ups, strict=True)], dim=1).to(dtype))

    @property
    def projection(self) -> LatentProjection:
        """The up side, as the decode kernels take it."""
        return LatentProjection(up=self.up, ranks=self.ranks, bias=self.bias)

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, ranks={list(self.ranks)}, bias={self.bias is not None}"
