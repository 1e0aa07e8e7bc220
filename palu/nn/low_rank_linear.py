"""A linear projection split into a cached down part and a per-group up part."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from palu.kernels.latents import LatentProjection, Latents
from palu.kernels.reconstruct.op import reconstruct


class LowRankLinear(nn.Module):
    """`y_g = up_g (down_g x) + bias_g` for every group of heads g.

    Parameters: `down.weight` [sum(ranks), in_features]; `up` [group_dim, sum(ranks)], the groups side by side;
    `bias` [groups * group_dim] or None. Ranks may differ from group to group. With `fused` up and bias are None: they
    are folded into the layer behind.
    """

    def __init__(
        self, in_features: int, out_features: int, ranks: Sequence[int], bias: bool, fused: bool = False
    ) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.out_features = out_features
        self.down = nn.Linear(in_features, sum(ranks), bias=False)
        self.up = None if fused else nn.Parameter(torch.empty(out_features // len(ranks), sum(ranks)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias and not fused else None
        if self.up is not None:
            nn.init.normal_(self.up, std=0.02)

    def latents(self, inputs: Tensor) -> Tensor:
        """What the cache holds: [batch, length, in_features] -> [batch, length, sum(ranks)]."""
        return self.down(inputs)

    def rebuild(self, latents: Latents, span: tuple[int, int] | None = None) -> Tensor:
        """[batch, length, sum(ranks)] -> [batch, length, outputs], all of them or those from span[0] to span[1]."""
        return reconstruct(latents, self.up, self.ranks, self.bias, span)

    def forward(self, inputs: Tensor) -> Tensor:
        """The projection itself: [batch, length, in_features] -> [batch, length, out_features]."""
        return self.rebuild(self.latents(inputs))

    @property
    def projection(self) -> LatentProjection:
        """The up side, as the decode kernels take it."""
        return LatentProjection(up=self.up, ranks=self.ranks, bias=self.bias)

    def extra_repr(self) -> str:
        shape = f"out_features={self.out_features}, ranks={list(self.ranks)}, bias={self.bias is not None}"
        return shape if self.up is not None else f"{shape}, fused"
