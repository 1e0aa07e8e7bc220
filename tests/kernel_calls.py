"""Calls of the kernels' ops with random arguments, and their definition in float64, written a different way."""

import torch

from palu.kernels.decode_attention.spec import REAL_SHAPES, SHAPES, TOLERANCE, Shape
from palu.kernels.latents import LatentProjection, MixedLatents, dense
from palu.kernels.quantize import PackedLatents, Quantization, quantize
from palu.kernels.rotation import Rotation

LATENTS = (MixedLatents, PackedLatents)
# What the kernels are checked on: real models' shapes too where there is a GPU.
KERNEL_SHAPES = SHAPES + (REAL_SHAPES if torch.cuda.is_available() else ())


def name_of(shape):
    """A shape in the names of tests."""
    return f"{shape.num_heads}-{shape.num_kv_heads}-{shape.head_dim}x{shape.length}"


def random_call(
    shape: Shape, dtype: torch.dtype, with_bias: bool, gapless: bool = False, attention_scaling: float = 1.0
):
    """Arguments of one call; every row has its own positions, with gaps or without, and its own padding."""

    def projection(ranks):
        up = torch.randn(shape.num_kv_heads // len(ranks) * shape.head_dim, sum(ranks)) / sum(ranks) ** 0.5
        bias = torch.randn(shape.num_kv_heads * shape.head_dim).to(dtype) if with_bias else None
        return LatentProjection(up.to(dtype), ranks, bias)

    query = torch.randn(shape.batch, shape.num_heads, shape.queries, shape.head_dim).to(dtype)
    latents = [torch.randn(shape.batch, shape.length, sum(r)).to(dtype) for r in (shape.key_ranks, shape.value_ranks)]
    # Small enough for float32 angles to be exact to 1e-5; interpolated ones are held to a tenth of that.
    positions = torch.randint(0, 300, (shape.batch, shape.length))
    if gapless:
        positions = torch.randint(0, 9, (shape.batch, 1)) + torch.arange(shape.length)
    frequencies = 10000.0 ** (-torch.arange(0, shape.head_dim, 2).double() / shape.head_dim)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    rotation = Rotation(positions, frequencies.float(), attention_scaling, tolerance)
    mask = torch.rand(shape.batch, 1, shape.queries, shape.length) < 0.7
    mask[..., -1] = True
    return query, *latents, projection(shape.key_ranks), projection(shape.value_ranks), rotation, mask


def quantized(latents, bits, *sides, symmetric=False):
    """Latents of both sides as codes, and what those stand for; 16 bits: as they are."""
    if bits == 16:
        return latents, latents
    settings = [Quantization(bits, tuple(side.ranks), symmetric) for side in sides]
    packed = [quantize(latent, setting) for latent, setting in zip(latents, settings, strict=True)]
    return packed, [dense(codes, torch.float32) for codes in packed]


def defined(query, key_latents, value_latents, key, value, rotation, mask, scaling, shape, norm):
    """The definition, head by head in float64: rebuild keys and values, rotate complex pairs, attend."""
    up = {}
    for side, latents, name in ((key, key_latents, "key"), (value, value_latents, "value")):
        groups, offset = [], 0
        for rank in side.ranks:
            groups.append(latents[..., offset : offset + rank].double() @ side.up[:, offset : offset + rank].double().T)
            offset += rank
        full = torch.cat(groups, -1) + (0 if side.bias is None else side.bias.double())
        up[name] = full.view(shape.batch, shape.length, shape.num_kv_heads, shape.head_dim)
    if norm is not None:
        up["key"] = norm(up["key"])
    keys = up["key"]
    if rotation is not None:
        first, second = keys.chunk(2, -1)
        positions = rotation.positions if rotation.positions.ndim == 3 else rotation.positions[..., None]
        angles = positions[..., None].double() * rotation.frequencies.double()
        turn = torch.complex(angles.cos(), angles.sin()) * rotation.attention_scaling
        # Consecutive kv heads share the positions of their group.
        rotated = torch.complex(first, second) * turn.repeat_interleave(shape.num_kv_heads // positions.shape[2], dim=2)
        keys = torch.cat([rotated.real, rotated.imag], -1)
    output = torch.full((shape.batch, shape.queries, shape.num_heads, shape.head_dim), float("nan")).double()
    for head in range(shape.num_heads):
        kv_head = head * shape.num_kv_heads // shape.num_heads
        scores = query[:, head].double() @ keys[:, :, kv_head].mT * scaling
        scores = scores.masked_fill(~mask[:, 0], float("-inf"))
        output[:, :, head] = scores.softmax(-1) @ up["value"][:, :, kv_head]
    return output.flatten(2)


def on_device(*call):
    """The arguments on the GPU where there is one; as they are where Triton interprets the kernels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    move = lambda value: value.to(device) if isinstance(value, torch.Tensor) else value  # noqa: E731
    moved = []
    for value in call:
        if isinstance(value, LatentProjection):
            value = LatentProjection(move(value.up), value.ranks, move(value.bias))
        if isinstance(value, Rotation):
            value = Rotation(move(value.positions), move(value.frequencies), value.attention_scaling, value.tolerance)
        moved.append(to_device(value, device) if isinstance(value, LATENTS) else move(value))
    return moved


def to_device(latents, device):
    """Latents of any kind on a device."""
    if isinstance(latents, MixedLatents):
        return MixedLatents(tuple(to_device(part, device) for part in latents.stretches))
    if isinstance(latents, torch.Tensor):
        return latents.to(device)
    # Parameters as one, so that zero points stay behind their scales.
    return PackedLatents.of(latents.codes.to(device), latents.parameters.to(device), latents.quantization)


class RandomNorm(torch.nn.Module):
    """A per-head norm as Qwen3's."""

    variance_epsilon = 1e-6

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(size) + 0.5, requires_grad=False)

    def forward(self, x):
        scale = (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return x * scale * self.weight.to(x)


def close(output, expected, dtype):
    """Whether an output is the definition's, up to the rounding of its dtype; never where one is not a number."""
    error = (output.double().cpu() - expected).norm() / expected.norm()
    return error < TOLERANCE[dtype]
