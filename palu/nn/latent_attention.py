"""The only attention forward: prefill on rebuilt keys and values, decode on the latents themselves."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from palu.config import LayerRanks
from palu.kernels.decode_attention.op import decode_attention
from palu.kernels.latents import LatentProjection, dense
from palu.kernels.query_rotation.op import rotate_queries
from palu.kernels.reconstruct.reference import reconstruct
from palu.kernels.rotation import Rotation, rotate
from palu.nn.latent_cache import layer_window
from palu.nn.latent_layer import HeldTokens, LatentLayer
from palu.nn.low_rank_linear import LowRankLinear
from palu.nn.masks import additive_mask, decode_mask
from palu.nn.rotary import KeyRotation
from palu.nn.sparse_layer import SparseLatentLayer
from palu.nn.votes import attention_votes

# Up to this many new tokens (speculative decoding included) attention runs on the latents.
FEW_TOKENS = 8
# Rebuilt keys and values of prefill are held for so many kv heads at a time that they take about this much memory.
REBUILT_BYTES = 256 << 20


class HeadGroup(NamedTuple):
    """Heads that attend to the same cached tokens.

    heads: the query heads; key, value: the up sides of theirs; tokens: what they attend to; rotation: of its keys.
    """

    heads: slice
    key: LatentProjection
    value: LatentProjection
    tokens: HeldTokens
    rotation: Rotation


class LatentAttention(nn.Module):
    """Replaces a decoder layer's self-attention: its key and value projections are low-rank and cached as latents.

    Args:
        attention: the family's attention module, whose other parts (q_proj, o_proj, norms) are taken over.
        ranks: this layer's ranks.
        query_key_norm: whether queries and rebuilt keys are normalised per head before RoPE (Qwen3).
    """

    def __init__(self, attention: nn.Module, ranks: LayerRanks, query_key_norm: bool) -> None:
        super().__init__()
        self.config = attention.config
        self.layer_idx = attention.layer_idx
        self.head_dim = attention.head_dim
        self.num_key_value_groups = attention.num_key_value_groups
        self.scaling = attention.scaling
        self.attention_dropout = attention.attention_dropout
        self.is_causal = True
        self.sliding_window = layer_window(attention.config, attention.layer_idx)
        self.q_proj, self.o_proj = attention.q_proj, attention.o_proj
        self.k_proj = _low_rank(attention.k_proj, ranks.key)
        self.v_proj = _low_rank(attention.v_proj, ranks.value, ranks.fused_values)
        if ranks.fused_values:
            bias = attention.v_proj.bias is not None or attention.o_proj.bias is not None
            self.o_proj = nn.Linear(sum(self.value_widths), attention.o_proj.out_features, bias)
        self.q_norm = attention.q_norm if query_key_norm else None
        self.k_norm = attention.k_norm if query_key_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        key_rotation: KeyRotation | None = None,
        token_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, length, hidden_size] -> the same, and the attention weights where the implementation returns them."""
        query = self._heads(self.q_proj(hidden_states), self.q_norm)
        query = rotate_queries(query, *position_embeddings)
        latents = self.k_proj.latents(hidden_states), self.v_proj.latents(hidden_states)
        layer, tokens = None, [HeldTokens(*latents, position_ids, hidden_states.shape[1])]
        if past_key_values is not None:
            latents = past_key_values.update(*latents, self.layer_idx, position_ids, token_mask)
            layer = past_key_values.layers[self.layer_idx]
            tokens = layer.by_group(*latents)
        groups = [self._head_group(index, tokens, query, key_rotation) for index in range(len(tokens))]
        results = [
            self._attend(query[:, group.heads], group, self._mask(attention_mask, layer, index, query), **kwargs)
            for index, group in enumerate(groups)
        ]
        output, weights = results[0] if len(results) == 1 else _joined(results)
        if isinstance(layer, SparseLatentLayer) and layer.is_due(query.shape[2]):
            layer.drop(lambda index: self._votes(query, groups[index], layer, index), query.shape[2])
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    @property
    def value_widths(self) -> list[int]:
        """Latents that each attention head sums: the rank of its value group."""
        heads_per_group = self.config.num_attention_heads // len(self.v_proj.ranks)
        return [rank for rank in self.v_proj.ranks for _ in range(heads_per_group)]

    def _heads(self, states: Tensor, norm: nn.Module | None) -> Tensor:
        """[batch, length, heads * head_dim] -> [batch, heads, length, head_dim], normalised per head."""
        states = states.view(*states.shape[:-1], -1, self.head_dim)
        return (states if norm is None else norm(states)).transpose(1, 2)

    def _head_group(self, index: int, tokens: list[HeldTokens], query: Tensor, key_rotation: KeyRotation) -> HeadGroup:
        """The heads of one of the token groups; all heads, where there is one only."""
        parts, count = len(tokens), query.shape[1] // len(tokens)
        held = tokens[index]
        # Groups and layers that keep tokens of their own do not share positions.
        kind = self.sliding_window if held.shared else (self.layer_idx, index)
        rotation = key_rotation(held.positions.to(query.device), kind)
        key, value = self.k_proj.projection_part(index, parts), self.v_proj.projection_part(index, parts)
        return HeadGroup(slice(index * count, (index + 1) * count), key, value, held, rotation)

    def _mask(self, mask: Tensor | None, layer: LatentLayer | None, index: int, query: Tensor) -> Tensor | None:
        """What one token group's heads may attend to: as the model says, until tokens are dropped."""
        if not isinstance(layer, SparseLatentLayer) or not layer.has_dropped:
            return mask
        visible = layer.visible(index, query.shape[2])
        return additive_mask(visible, query.dtype) if self.config._attn_implementation == "eager" else visible

    def _attend(self, query: Tensor, group: HeadGroup, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Attention of some heads, [batch, length, features] side by side, and weights where there are any."""
        if not self._decodes(query.shape[2], mask):
            return self._prefill(query, group, mask, **kwargs)
        length = group.tokens.keys.shape[1]
        mask = decode_mask(mask, query, length, group.tokens.filled, self.sliding_window)
        return self._decode(query, group, mask)

    def _prefill(
        self, query: Tensor, group: HeadGroup, attention_mask: Tensor | None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Rebuild keys and values, as many heads at a time as fit, and use the model's attention implementation."""
        implementation = self.config._attn_implementation
        if "flash" in implementation and attention_mask is not None and attention_mask.ndim == 4:
            # Behind dropped tokens a query's window is none of neighbouring slots, which flash attention takes only.
            implementation = "sdpa"
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        kv_heads = query.shape[1] // self.num_key_value_groups
        batch, length, _ = group.tokens.keys.shape
        step = max(1, REBUILT_BYTES // (2 * batch * length * self.head_dim * query.element_size()))
        outputs = []
        for first in range(0, kv_heads, step):
            heads = range(first, min(first + step, kv_heads))
            queries = query[:, heads.start * self.num_key_value_groups : heads.stop * self.num_key_value_groups]
            outputs.append(
                attend(
                    self,
                    queries,
                    self._rebuilt_keys(group, heads),
                    self._rebuilt_values(group, heads, query.dtype),
                    attention_mask,
                    dropout=self.attention_dropout if self.training else 0.0,
                    scaling=self.scaling,
                    sliding_window=self.sliding_window,
                    **kwargs,
                )
            )
        output = torch.cat([output for output, _ in outputs], dim=2)
        weights = None if outputs[0][1] is None else torch.cat([weights for _, weights in outputs], dim=1)
        return _of_latents(output, group.value.ranks) if group.value.up is None else output.flatten(2), weights

    def _rebuilt_keys(self, group: HeadGroup, heads: range) -> Tensor:
        """Rotated keys of some of a group's kv heads, [batch, heads, length, head_dim]."""
        span = heads.start * self.head_dim, heads.stop * self.head_dim
        key = reconstruct(group.tokens.keys, group.key.up, group.key.ranks, group.key.bias, span)
        return rotate(self._heads(key, self.k_norm), *(table[:, None] for table in group.rotation.tables(key.dtype)))

    def _rebuilt_values(self, group: HeadGroup, heads: range, dtype: torch.dtype) -> Tensor:
        """Values of some kv heads, [batch, heads, length, head_dim]; the latents themselves where up is folded away."""
        latents, value = group.tokens.values, group.value
        if value.up is not None:
            span = heads.start * self.head_dim, heads.stop * self.head_dim
            return self._heads(reconstruct(latents, value.up, value.ranks, value.bias, span), None)
        ranks = value.ranks
        query_heads = group.heads.stop - group.heads.start
        heads_per_group = query_heads // self.num_key_value_groups // len(ranks)
        groups = range(heads.start // heads_per_group, (heads.stop - 1) // heads_per_group + 1)
        padded = {}
        for index in groups:
            values = dense(latents, dtype, sum(ranks[:index]), ranks[index])
            padded[index] = nn.functional.pad(values, (0, self.head_dim - ranks[index]))
        return torch.stack([padded[head // heads_per_group] for head in heads], dim=1)

    def _decode(self, query: Tensor, group: HeadGroup, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attend to the latents: keys rebuilt block by block, values absorbed."""
        is_eager = self.config._attn_implementation == "eager"
        output, weights = decode_attention(
            query,
            group.tokens.keys,
            group.tokens.values,
            group.key,
            group.value,
            group.rotation,
            mask,
            self.scaling,
            key_norm=self.k_norm,
            with_probabilities=is_eager,
        )
        return output, weights if is_eager else None

    def _votes(self, query: Tensor, group: HeadGroup, layer: SparseLatentLayer, index: int) -> Tensor:
        """The attention that the newest queries pay to a token group's tokens, [batch, length]."""
        count = min(query.shape[2], layer.policy.settings.window_size)
        return attention_votes(
            query[:, group.heads, -count:],
            group.tokens.keys,
            group.key,
            group.rotation,
            layer.visible(index, count),
            self.scaling,
            self.k_norm,
        )

    def _decodes(self, queries: int, attention_mask: object) -> bool:
        """Whether this call can attend to the latents: few new tokens, and a mask of a kind that is understood."""
        dense_mask = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim in (2, 4))
        return queries <= FEW_TOKENS and dense_mask and not self.training


def _joined(results: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Outputs of token groups side by side. Weights, of tokens that differ from group to group, are none."""
    return torch.cat([output for output, _ in results], dim=-1), None


def _of_latents(output: Tensor, ranks: Sequence[int]) -> Tensor:
    """Attention output over padded latents [batch, length, heads, head_dim] to the heads' latents side by side."""
    per_group = output.shape[2] // len(ranks)
    heads = zip(output.unbind(2), (rank for rank in ranks for _ in range(per_group)), strict=True)
    return torch.cat([head[..., :width] for head, width in heads], dim=-1)


def _low_rank(projection: nn.Linear, ranks: tuple[int, ...], fused: bool = False) -> LowRankLinear:
    bias = projection.bias is not None
    return LowRankLinear(projection.in_features, projection.out_features, ranks, bias, fused)
