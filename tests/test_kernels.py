"""Every op against a float64 definition written a different way."""

import pytest
import torch

from palu.kernels.decode_attention import launch, reference
from palu.kernels.decode_attention.op import decode_attention
from palu.kernels.decode_attention.spec import SHAPES, TOLERANCE, Shape
from palu.kernels.latents import LatentProjection, MixedLatents, dense
from palu.kernels.quantize import PackedLatents, Quantization, quantization_widths, quantize
from palu.kernels.rotation import Rotation


def random_call(shape: Shape, dtype: torch.dtype, with_bias: bool, gapless: bool = False):
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
    rotation = Rotation(positions, frequencies.float(), tolerance=1e-6 if dtype == torch.float32 else 1e-3)
    mask = torch.rand(shape.batch, 1, shape.queries, shape.length) < 0.7
    mask[..., -1] = True
    return query, *latents, projection(shape.key_ranks), projection(shape.value_ranks), rotation, mask


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
    half = shape.head_dim // 2
    angles = rotation.positions[..., None].double() * rotation.frequencies.double()
    turn = torch.complex(angles.cos(), angles.sin())
    rotated = torch.complex(up["key"][..., :half], up["key"][..., half:]) * turn[:, :, None]
    keys = torch.cat([rotated.real, rotated.imag], -1)
    output = torch.full((shape.batch, shape.queries, shape.num_heads, shape.head_dim), float("nan")).double()
    for head in range(shape.num_heads):
        kv_head = head * shape.num_kv_heads // shape.num_heads
        scores = query[:, head].double() @ keys[:, :, kv_head].mT * scaling
        scores = scores.masked_fill(~mask[:, 0], float("-inf"))
        output[:, :, head] = scores.softmax(-1) @ up["value"][:, :, kv_head]
    return output.flatten(2)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.num_heads}-{s.num_kv_heads}-{s.head_dim}x{s.length}")
@pytest.mark.parametrize("variant", ["plain", "bias", "key norm"])
def test_decode_attention_equals_its_definition(shape, dtype, variant, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_LENGTH", 50)
    weight = torch.rand(shape.head_dim) + 0.5
    norm = (
        (lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.to(x))
        if variant == "key norm"
        else None
    )
    call = random_call(shape, getattr(torch, dtype), variant == "bias")
    scaling = shape.head_dim**-0.5
    output, probabilities = decode_attention(*call, scaling, key_norm=norm)
    expected = defined(*call, scaling, shape, norm)
    assert output.dtype == call[0].dtype
    assert (output.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]
    assert probabilities.float().sum(-1).allclose(torch.ones(()), atol=2e-2)
    additive = torch.zeros(call[-1].shape).masked_fill(~call[-1], -1e30)
    again, _ = decode_attention(*call[:-1], additive, scaling, key_norm=norm)
    assert torch.allclose(again.float(), output.float(), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.num_heads}-{s.num_kv_heads}-{s.head_dim}x{s.length}")
def test_arithmetic_on_codes_equals_dequantising_first(shape, bits, symmetric, group_size, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_LENGTH", 50)
    query, *latents, key, value, rotation, mask = random_call(shape, torch.float32, True)
    packed = [
        quantize(latent * 3 + 0.2, Quantization(bits, quantization_widths(ranks, group_size), symmetric))
        for latent, ranks in zip(latents, (shape.key_ranks, shape.value_ranks), strict=True)
    ]
    output, _ = decode_attention(query, *packed, key, value, rotation, mask, shape.head_dim**-0.5)
    dense = [codes.dequantized(torch.float32) for codes in packed]
    expected = defined(query, *dense, key, value, rotation, mask, shape.head_dim**-0.5, shape, None)
    assert (output.double() - expected).norm() / expected.norm() < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_long_flat_attention_over_offset_latents_stays_in_the_range_of_16_bit_floats(bits, dtype):
    shape = Shape(1, 2, 2, 64, 1, 4500, (64,), (64,))
    query, *latents, key, value, rotation, _ = random_call(shape, torch.float32, False)
    mask = torch.ones(1, 1, 1, shape.length, dtype=torch.bool)
    # One latent lies at the top of every token's range, another far from zero.
    latents = [latent + 30 * (torch.arange(64) == 3) - 20 * (torch.arange(64) == 9) for latent in latents]
    held = latents
    if bits < 16:
        latents = [quantize(latent, Quantization(bits, (64,))) for latent in latents]
        held = [packed.dequantized(torch.float32) for packed in latents]
    low = getattr(torch, dtype)
    cast = [latent if bits < 16 else latent.to(low) for latent in latents]
    sides = [LatentProjection(side.up.to(low), side.ranks, None) for side in (key, value)]
    output, _ = decode_attention(query.to(low), *cast, *sides, rotation, mask, 1e-3)
    expected = defined(query, *held, key, value, rotation, mask, 1e-3, shape, None)
    assert torch.isfinite(output).all()
    assert (output.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


def on_device(call):
    """The arguments on the GPU where there is one, and one as they are where Triton interprets the kernels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    move = lambda value: value.to(device) if isinstance(value, torch.Tensor) else value  # noqa: E731
    moved = []
    for value in call:
        if isinstance(value, LatentProjection):
            value = LatentProjection(move(value.up), value.ranks, move(value.bias))
        if isinstance(value, Rotation):
            value = Rotation(move(value.positions), move(value.frequencies), value.attention_scaling, value.tolerance)
        moved.append(move(value))
    return moved


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
    error = (output.double().cpu() - expected).norm() / expected.norm()
    return error < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.num_heads}-{s.num_kv_heads}-{s.head_dim}x{s.length}")
@pytest.mark.parametrize("variant", ["plain", "bias", "key norm"])
@pytest.mark.parametrize("gapless", [True, False], ids=["gapless", "gaps"])
def test_kernels_equal_the_definition(shape, dtype, variant, gapless):
    call = random_call(shape, getattr(torch, dtype), variant == "bias", gapless)
    norm = RandomNorm(shape.head_dim) if variant == "key norm" else None
    scaling = shape.head_dim**-0.5
    expected = defined(*call, scaling, shape, norm)
    additive = torch.zeros(call[-1].shape).masked_fill(~call[-1], torch.finfo(torch.float32).min)
    for mask in (call[-1], additive):
        moved = on_device((*call[:-1], mask))
        moved_norm = None if norm is None else norm.to(moved[0].device)
        assert launch.can_take(*moved[:-1], moved[-1], moved_norm)
        assert close(launch.decode_attention(*moved, scaling, moved_norm), expected, dtype)


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.num_heads}-{s.num_kv_heads}-{s.head_dim}x{s.length}")
@pytest.mark.parametrize("gapless", [True, False], ids=["gapless", "gaps"])
def test_kernels_read_packed_latents_beside_exact_ones(shape, bits, symmetric, gapless):
    query, *latents, key, value, rotation, mask = random_call(shape, torch.float32, True, gapless)
    mixed, held = [], []
    for latent, ranks in zip(latents, (shape.key_ranks, shape.value_ranks), strict=True):
        packed = quantize(latent * 3 + 0.2, Quantization(bits, tuple(ranks), symmetric))
        if shape.length < 8:
            mixed.append(packed)
        else:
            middle = packed.narrow(1, 3, shape.length - 5)
            mixed.append(MixedLatents((latent[:, :3], middle, latent[:, -2:])))
        held.append(dense(mixed[-1], torch.float32))
    expected = defined(query, *held, key, value, rotation, mask, 0.1, shape, None)
    moved = on_device((query, key, value, rotation, mask))
    sides = [to_device(latent, moved[0].device) for latent in mixed]
    call = (moved[0], *sides, *moved[1:3])
    assert launch.can_take(*call, *moved[3:], None)
    assert close(launch.decode_attention(*call, *moved[3:], 0.1), expected, "float32")


def to_device(latents, device):
    """Latents of any kind on a device."""
    if isinstance(latents, MixedLatents):
        return MixedLatents(tuple(to_device(part, device) for part in latents.stretches))
    if isinstance(latents, torch.Tensor):
        return latents.to(device)
    zeros = None if latents.zeros is None else latents.zeros.to(device)
    return PackedLatents(latents.codes.to(device), latents.scales.to(device), zeros, latents.quantization)


def test_kernels_leave_to_the_reference_what_they_cannot_take():
    query, keys, values, key, value, rotation, mask = random_call(SHAPES[1], torch.float32, False)
    call = (query, keys, values, key, value)
    assert launch.can_take(*call, rotation, mask, None)
    assert not launch.can_take(*call, rotation, mask.expand(-1, 8, -1, -1), None)
    assert not launch.can_take(*call, rotation, mask, lambda x: x)
    assert not launch.can_take(query.double(), *call[1:], rotation, mask, None)
    assert not launch.can_take(query, keys.half(), *call[2:], rotation, mask, None)
    uneven = LatentProjection(key.up, (100, 28), None)
    assert not launch.can_take(query, keys, values, uneven, value, rotation, mask, None)
    fine = quantize(keys, Quantization(4, quantization_widths(key.ranks, 16)))
    assert not launch.can_take(query, fine, values, key, value, rotation, mask, None)
    assert not launch.can_take(query.requires_grad_(), *call[1:], rotation, mask, None)


def test_quantisation_groups_across_a_border_are_refused():
    packed = quantize(torch.randn(1, 2, 64), Quantization(4, (40, 24)))
    with pytest.raises(ValueError, match="do not fit the ranks"):
        packed.pieces((32, 32))


def test_widths_that_do_not_fit_the_ranks_are_refused():
    query, keys, values, key, value, rotation, mask = random_call(SHAPES[1], torch.float32, False)
    with pytest.raises(ValueError, match="key latents are 127 wide"):
        decode_attention(query, keys[..., :-1], values, key, value, rotation, mask, 1.0)
    with pytest.raises(ValueError, match="63 key latents but 62 value latents"):
        decode_attention(query, keys, values[:, 1:], key, value, rotation, mask, 1.0)


def test_half_precision_scores_are_scaled_before_they_can_overflow():
    shape = Shape(1, 2, 2, 64, 1, 5, (64,), (64,))
    query, keys, values, key, value, rotation, mask = random_call(shape, torch.float16, False)
    output, _ = decode_attention(query * 60, keys * 60, values, key, value, rotation, mask, 1 / 64)
    assert torch.isfinite(output).all()


def test_cost_formulas():
    shape = Shape(2, 8, 4, 64, 1, 10, (96, 32), (160,))
    assert shape.bytes_read(2) == 2 * 10 * (128 + 160) * 2
    assert shape.flops() == 2 * 2 * 10 * (128 * 128 + 8 * 64 + 160 * 8)
