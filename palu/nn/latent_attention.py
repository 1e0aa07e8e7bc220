"""The only attention forward: prefill on rebuilt keys and values, decode on the latents themselves."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from palu.config import LayerRanks
from palu.kernels.decode_attention.op import decode_attention
from palu.kernels.head_rotation.op import rotate_heads
from palu.kernels.latents import Latents, dense
from palu.kernels.rotation import Rotation, rotate
from palu.nn.latent_cache import layer_window
from palu.nn.low_rank_linear import LowRankLinear
from palu.nn.masks import additive_mask, by_heads, decode_mask
from palu.nn.rotary import KeyRotation
from palu.nn.sparse_layer import SparseLatentLayer
from palu.nn.votes import attention_votes

# Up to this many new tokens (speculative decoding included) attention runs on the latents.
FEW_TOKENS = 8
# Rebuilt keys and values of prefill are held for so many kv heads at a time that they take about this much memory.
REBUILT_BYTES = 256 << 20


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
        query = rotate_heads(query, *position_embeddings)
        key_latents = self.k_proj.latents(hidden_states)
        value_latents = self.v_proj.latents(hidden_states)
        positions, filled, kind, layer = position_ids, key_latents.shape[1], self.sliding_window, None
        if past_key_values is not None:
            key_latents, value_latents = past_key_values.update(
                key_latents, value_latents, self.layer_idx, position_ids, token_mask
            )
            layer = past_key_values.layers[self.layer_idx]
            positions, filled = layer.positions.to(query.device), layer.filled
        is_sparse = isinstance(layer, SparseLatentLayer)
        if is_sparse and layer.has_dropped:
            # Masks and positions of a layer that keeps tokens of its own are its own.
            attention_mask, kind = self._own_mask(layer, query), (self.sliding_window, self.layer_idx)
        rotation = key_rotation(positions, kind)
        if self._decodes(query.shape[2], attention_mask):
            mask = decode_mask(attention_mask, query, key_latents.shape[1], filled, self.sliding_window)
            output, weights = self._decode(query, key_latents, value_latents, rotation, mask)
        else:
            output, weights = self._prefill(query, key_latents, value_latents, rotation, attention_mask, **kwargs)
        if is_sparse and layer.is_due(query.shape[2]):
            layer.drop(lambda: self._votes(query, key_latents, rotation, layer), query.shape[2])
        output = output.reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(output), weights

    @property
    def value_widths(self) -> list[int]:
        """Latents that each attention head sums: the rank of its value group."""
        heads_per_group = self.config.num_attention_heads // len(self.v_proj.ranks)
        return [rank for rank in self.v_proj.ranks for _ in range(heads_per_group)]

    def _heads(self, states: Tensor, norm: nn.Module | None) -> Tensor:
        """[batch, length, heads * head_dim] -> [batch, heads, length, head_dim], normalised per head."""
        states = states.view(*states.shape[:-1], -1, self.head_dim)
        return (states if norm is None else norm(states)).transpose(1, 2)

    def _prefill(
        self,
        query: Tensor,
        key_latents: Latents,
        value_latents: Latents,
        rotation: Rotation,
        attention_mask: Tensor | None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Rebuild keys and values, as many heads at a time as fit, and use the model's attention implementation."""
        implementation = self.config._attn_implementation
        if "flash" in implementation and attention_mask is not None and attention_mask.ndim == 4:
            # Flash attention takes windows of neighbouring slots only, which kept tokens are not.
            implementation = "sdpa"
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        kv_heads = query.shape[1] // self.num_key_value_groups
        batch, length, _ = key_latents.shape
        step = max(1, REBUILT_BYTES // (2 * batch * length * self.head_dim * query.element_size()))
        outputs = []
        for first in range(0, kv_heads, step):
            heads = range(first, min(first + step, kv_heads))
            these = slice(heads.start * self.num_key_value_groups, heads.stop * self.num_key_value_groups)
            mask = attention_mask
            if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
                mask = mask[:, these]
            outputs.append(
                attend(
                    self,
                    query[:, these],
                    self._rebuilt_keys(key_latents, heads, rotation),
                    self._rebuilt_values(value_latents, heads, query.dtype),
                    mask,
                    dropout=self.attention_dropout if self.training else 0.0,
                    scaling=self.scaling,
                    sliding_window=self.sliding_window,
                    **kwargs,
                )
            )
        output = torch.cat([output for output, _ in outputs], dim=2)
        weights = None if outputs[0][1] is None else torch.cat([weights for _, weights in outputs], dim=1)
        return self._of_latents(output) if self.v_proj.up is None else output, weights

    def _rebuilt_keys(self, latents: Latents, heads: range, rotation: Rotation) -> Tensor:
        """Rotated keys of some kv heads, [batch, heads, length, head_dim]."""
        key = self.k_proj.rebuild(latents, (heads.start * self.head_dim, heads.stop * self.head_dim))
        keys = self._heads(key, self.k_norm)
        if rotation.groups == 1:
            return rotate_heads(keys, *rotation.tables(key.dtype))
        tables = rotation.by_head(key.dtype, self.config.num_key_value_heads)
        return rotate(keys, *(table[:, heads.start : heads.stop] for table in tables))

    def _rebuilt_values(self, latents: Latents, heads: range, dtype: torch.dtype) -> Tensor:
        """Values of some kv heads, [batch, heads, length, head_dim]; the latents themselves where up is folded away."""
        if self.v_proj.up is not None:
            value = self.v_proj.rebuild(latents, (heads.start * self.head_dim, heads.stop * self.head_dim))
            return self._heads(value, None)
        ranks = self.v_proj.ranks
        heads_per_group = self.config.num_key_value_heads // len(ranks)
        groups = range(heads.start // heads_per_group, (heads.stop - 1) // heads_per_group + 1)
        padded = {}
        for group in groups:
            values = dense(latents, dtype, sum(ranks[:group]), ranks[group])
            padded[group] = nn.functional.pad(values, (0, self.head_dim - ranks[group]))
        return torch.stack([padded[head // heads_per_group] for head in heads], dim=1)

    def _of_latents(self, output: Tensor) -> Tensor:
        """Attention output over padded latents [batch, length, heads, head_dim] to the heads' latents side by side."""
        heads = zip(output.unbind(2), self.value_widths, strict=True)
        return torch.cat([head[..., :width] for head, width in heads], dim=-1)

    def _decode(
        self,
        query: Tensor,
        key_latents: Latents,
        value_latents: Latents,
        rotation: Rotation,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the latents: keys rebuilt block by block, values absorbed."""
        is_eager = self.config._attn_implementation == "eager"
        output, weights = decode_attention(
            query,
            key_latents,
            value_latents,
            self.k_proj.projection,
            self.v_proj.projection,
            rotation,
            mask,
            self.scaling,
            key_norm=self.k_norm,
            with_probabilities=is_eager,
        )
        return output, weights if is_eager else None

    def _decodes(self, queries: int, attention_mask: object) -> bool:
        """Whether this call can attend to the latents: few new tokens, and a mask of a kind that is understood."""
        dense_mask = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim in (2, 4))
        return queries <= FEW_TOKENS and dense_mask and not self.training

    def _own_mask(self, layer: SparseLatentLayer, query: Tensor) -> Tensor | None:
        """What new tokens may attend to of those that a layer has kept, in the form that attention takes."""
        visible = by_heads(layer.visible(query.shape[2]), query.shape[1])
        if self._decodes(query.shape[2], visible) or self.config._attn_implementation != "eager":
            return visible
        return additive_mask(visible, query.dtype)

    def _votes(self, query: Tensor, key_latents: Latents, rotation: Rotation, layer: SparseLatentLayer) -> Tensor:
        """The attention that the newest queries pay to the tokens, [batch, token groups, length]."""
        count = min(query.shape[2], layer.policy.settings.window_size)
        call = (query[:, :, -count:], key_latents, self.k_proj.projection, rotation)
        return attention_votes(*call, layer.visible(count), self.scaling, self.k_norm, layer.token_groups)


def _low_rank(projection: nn.Linear, ranks: tuple[int, ...], fused: bool = False) -> LowRankLinear:
    bias = projection.bias is not None
    return LowRankLinear(projection.in_features, projection.out_features, ranks, bias, fused)
