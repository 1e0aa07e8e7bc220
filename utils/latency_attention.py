"""A decoding step's attention over latents, and over full keys and values, on random inputs."""

import argparse
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from utils import latency
from utils.latency import Call, Cost, Peaks, Timing
from utils.latency_shapes import (
    Heads,
    common_columns,
    full_attention_cost,
    in_float64,
    latent_attention_cost,
    random_latents,
    random_up,
    relative_error,
    rotation_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from palu.kernels.decode_attention.compiled import Norm
    from palu.kernels.latents import LatentProjection
    from palu.kernels.rotation import Rotation


@dataclass
class Attention:
    """One configuration: who computes it (`latents` or a baseline), its bits, its size."""

    heads: Heads
    provider: str
    bits: int
    batch: int
    length: int
    args: argparse.Namespace
    device: str

    @property
    def is_baseline(self) -> bool:
        """Whether full keys and values are read."""
        return self.provider != "latents"

    @property
    def scaling(self) -> float:
        """Of the scores."""
        return self.heads.head_dim**-0.5

    @cached_property
    def ranks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ranks of the groups, keys' and values'."""
        return self.heads.ranks(self.args.rank_k, "--rank_k"), self.heads.values.ranks(self.args.rank_v, "--rank_v")

    @property
    def both_bits(self) -> tuple[int, int]:
        """Of keys and of values."""
        return self.bits, self.args.value_bits or self.bits

    @property
    def exact(self) -> tuple[int, int]:
        """First and newest tokens that are exact beside codes."""
        return self.args.sinks, self.args.window

    @property
    def cost(self) -> Cost:
        """What a call cannot do without."""
        if self.is_baseline:
            return full_attention_cost(self.heads, self.batch, self.length)
        size = self.batch, self.length, self.args.no_rope, sum(self.exact)
        return latent_attention_cost(self.heads, self.ranks, self.both_bits, *size)

    def rotation(self) -> "Rotation | None":
        """Shared by all calls, as by the layers of a model; None where keys are absorbed."""
        if self.is_baseline or self.args.no_rope:
            return None
        return rotation_of(self.heads, self.args.rope_base, self.batch, self.length, self.device)

    def inputs(self) -> "tuple[Tensor, Any, Any, LatentProjection, LatentProjection]":
        """New random queries, key and value latents and their up sides."""
        import torch

        from palu.kernels.latents import LatentProjection

        key_ranks, value_ranks = self.ranks
        options = {"device": self.device, "dtype": torch.float16}
        width = key_ranks[0] if self.args.no_rope else self.heads.head_dim
        # An absorbed query has the variance that the product with an up factor would give it.
        query = torch.randn(self.batch, self.heads.num_heads, 1, width, **options)
        query *= math.sqrt(self.heads.head_dim / width)
        keys, values = (
            random_latents(self.batch, self.length, ranks, bits, self.device, self.exact)
            for ranks, bits in zip(self.ranks, self.both_bits, strict=True)
        )
        key_up = None if self.args.no_rope else random_up(self.heads, key_ranks, self.device)
        value_up = random_up(self.heads.values, value_ranks, self.device)
        features = self.heads.num_kv_heads * self.heads.head_dim
        bias = torch.randn(features, **options) if self.args.key_biases else None
        return query, keys, values, LatentProjection(key_up, key_ranks, bias), LatentProjection(value_up, value_ranks)

    @cached_property
    def key_norm(self) -> "Norm | None":
        """Of all keys, with random weights; None without `--key_norm`."""
        if self.is_baseline or not self.args.key_norm:
            return None
        import torch

        from palu.kernels.decode_attention.compiled import Norm

        return Norm(torch.rand(self.heads.head_dim, device=self.device, dtype=torch.float16) + 0.5, 1e-6)

    def call(self, rotation: "Rotation | None" = None) -> Call:
        """The attention on new random inputs."""
        import torch

        heads = self.heads
        if self.is_baseline:
            options = {"device": self.device, "dtype": torch.float16}
            query = torch.randn(self.batch, heads.num_heads, 1, heads.head_dim, **options)
            keys, values = torch.randn(2, self.batch, heads.num_kv_heads, self.length, heads.head_dim, **options)
            return lambda: latency.full_attention(self.provider, query, keys, values, self.scaling)
        inputs = self.inputs()
        rotation = rotation or self.rotation()
        return lambda: self.attend(inputs, rotation)

    def attend(self, inputs: tuple, rotation: "Rotation | None") -> "Tensor":
        """The kernels' output, [batch, 1, heads * head_dim]."""
        from palu.kernels.decode_attention.op import decode_attention

        return decode_attention(
            *inputs, rotation, None, self.scaling, self.key_norm, self.heads.head_dim, with_probabilities=False
        )[0]

    def error(self, rotation: "Rotation | None") -> float:
        """Relative error of the kernels' output of new inputs to float64."""
        from palu.kernels.decode_attention.reference import decode_attention as reference

        inputs = self.inputs()
        query, key_latents, value_latents, key, value = inputs
        # Groups of keys that share values, or the other way round, together.
        parts = math.gcd(len(key.ranks), len(value.ranks))
        queries = query.double().chunk(parts, dim=1)

        def of_part(part: int) -> "Tensor":
            keys, key_side = in_float64(key_latents, key, part, parts)
            values, value_side = in_float64(value_latents, value, part, parts)
            return reference(
                queries[part], keys, values, key_side, value_side, rotation, None, self.scaling, self.key_norm,
                self.heads.head_dim,
            )[0]  # fmt: skip

        return relative_error(self.attend(inputs, rotation), of_part, parts, dim=-1)


def measure(task: Attention, peaks: Peaks) -> dict[str, Any]:
    """The row of one configuration."""

    def timed() -> tuple[Timing, float | None]:
        rotation = task.rotation()
        calls = latency.rotating_calls(lambda: task.call(rotation), task.cost.bytes, task.device)
        timing = latency.time_calls(calls, task.args.repeats, task.args.cuda_graph, rest=task.args.rest)
        return timing, task.error(rotation) if task.args.check and not task.is_baseline else None

    found, note = latency.attempt(timed, optional=task.is_baseline)
    timing, error = found or (None, None)
    heads = task.heads
    return {
        **common_columns(task.provider, task.bits, task.length, task.batch, task.is_baseline),
        **latency.timing_columns(timing, note),
        **latency.cost_columns(timing, task.cost, peaks),
        "relative_error": error,
        **heads.columns(),
        "group_size": heads.group_size,
        "value_group_size": heads.values.group_size,
        "rank_k": None if task.is_baseline else task.args.rank_k,
        "rank_v": None if task.is_baseline else task.args.rank_v,
        "value_bits": None if task.is_baseline else task.both_bits[1],
        "sinks": None if task.is_baseline else task.args.sinks,
        "window": None if task.is_baseline else task.args.window,
        "rope": not task.args.no_rope,
        "key_biases": None if task.is_baseline else task.args.key_biases,
        "key_norm": None if task.is_baseline else task.args.key_norm,
    }
