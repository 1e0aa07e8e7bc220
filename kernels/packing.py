"""The one place that knows how latent codes lie in memory.

A row of `width` codes of `bits` bits is stored as bit planes of 8, 4, 2 and 1 bits, side by side: 3 bits are a plane of
2 and a plane of 1, so that nothing is wasted and no code straddles a byte. Within a plane, consecutive codes fill a
byte from its low end. A plane takes `ceil(width * plane_bits / 8)` bytes.
"""

import torch
from torch import Tensor

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def packed_width(width: int, bits: int) -> int:
    """Bytes of one row of `width` codes."""
    return sum(-(-width * plane // 8) for plane in PLANES[bits])


def last_plane(width: int, bits: int) -> int:
    """Bytes of a row of `width` codes before its last plane."""
    return sum(-(-width * plane // 8) for plane in PLANES[bits][:-1])


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., width], each below `2 ** bits`, to uint8 bytes [..., packed_width(width, bits)]."""
    parts, shift = [], 0
    for plane in PLANES[bits]:
        parts.append(_pack_plane((codes >> shift) & (2**plane - 1), plane))
        shift += plane
    return torch.cat(parts, dim=-1)


def unpack(packed: Tensor, width: int, bits: int, start: int = 0, count: int | None = None) -> Tensor:
    """The inverse of `pack`, for all `width` codes of a row or for `count` of them from `start`: uint8 [..., count].

    Only the bytes that hold the wanted codes are read.
    """
    count = width - start if count is None else count
    codes, shift, offset = None, 0, 0
    for plane in PLANES[bits]:
        first, skipped = divmod(start * plane, 8)
        last = -(-(start + count) * plane // 8)
        skipped //= plane
        values = _unpack_plane(packed[..., offset + first : offset + last], skipped + count, plane)[..., skipped:]
        codes = values << shift if codes is None else codes | values << shift
        shift += plane
        offset += -(-width * plane // 8)
    return codes


def _pack_plane(values: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    missing = -values.shape[-1] % per_byte
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    values = values.unflatten(-1, (-1, per_byte))
    packed = values[..., 0].clone()
    for index in range(1, per_byte):
        packed |= values[..., index] << (index * bits)
    return packed


def _unpack_plane(packed: Tensor, width: int, bits: int) -> Tensor:
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values = (packed[..., None] >> shifts) & (2**bits - 1)
    return values.flatten(-2)[..., :width]
