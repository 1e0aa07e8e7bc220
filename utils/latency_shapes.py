"""What is measured: heads and ranks as asked, what they cost at least, random inputs, the float64 check."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.latency import Cost

if TYPE_CHECKING:
    from torch import Tensor

    from palu.kernels.latents import LatentProjection, Latents
    from palu.kernels.rotation import Rotation

HEAD_DIMS = (64, 96, 128)
RANK_MULTIPLE = 16
# Of a GPU between measurements, in times of its work.
REST, MOST_REST = 3.0, 100
# Numbers that are drawn, and quantised, at a time.
PIECE = 1 << 26


def count_list(text: str) -> list[int]:
    """Argparse type of comma-separated whole numbers, each once."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers such as 4096,65536") from None


def check_counts(counts: dict[str, int | Sequence[int]]) -> None:
    """Refuse numbers below 1; keys are the flags' names."""
    from palu.core.validate import require

    for flag, value in counts.items():
        for number in [value] if isinstance(value, int) else value:
            require(number >= 1, f"{flag} {number} must be at least 1")


def check_bits(bits: Sequence[int], flag: str = "--bits") -> None:
    """Refuse bits that latents cannot have."""
    from palu.core.validate import require
    from palu.quantization import ALLOWED_BITS

    allowed = ", ".join(map(str, sorted(ALLOWED_BITS, reverse=True)))
    for number in bits:
        require(number in ALLOWED_BITS, f"{flag} {number} must be one of {allowed}")


def add_rest_flag(flag: Callable[..., Any], default: float | None = REST) -> None:
    """Add `--rest`; default: None where a script fills REST in itself."""
    flag(
        "--rest",
        type=float,
        default=default,
        help="how many times as long as it works the GPU rests ahead of each measurement, so that its power limit does "
        f"not lower the clock; 0: back to back (default: {REST:g})",
    )


def check_rest(rest: float) -> None:
    """Refuse what is no share of time."""
    from palu.core.validate import require

    require(0 <= rest <= MOST_REST, f"--rest {rest} must be from 0 to {MOST_REST}")


def check_rope_base(base: float) -> None:
    """Refuse what is no base of rotary frequencies."""
    from palu.core.validate import require

    require(math.isfinite(base) and base > 1, f"--rope_base {base} must be a number above 1, such as 10000")


def record_path(asked: str | None, script: str, name: str) -> Path:
    """The result file, beside which a table of the same name is written."""
    from palu.core.validate import require
    from utils.results import results_path

    path = results_path(asked, script, name)
    require(path.suffix != ".csv", f"--results {asked}: the CSV takes that name; use another ending, such as .json")
    return path


@dataclass(frozen=True)
class Heads:
    """The heads of one attention layer; `group_size` kv heads share a latent.

    value_group_size: the same for values, None if it is the same.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    group_size: int
    value_group_size: int | None = None

    @classmethod
    def asked(cls, args: argparse.Namespace) -> "Heads":
        """From the command line, of which not every script's has `--value_group_size`.

        Raises:
            PaluError: if they do not fit one another.
        """
        from palu.config import resolve_group_size
        from palu.core.validate import require

        kv_heads = args.num_heads if args.num_kv_heads is None else args.num_kv_heads
        check_counts({"--num_heads": args.num_heads, "--num_kv_heads": kv_heads})
        fits = args.num_heads % kv_heads == 0
        require(fits, f"--num_heads {args.num_heads} must be a multiple of --num_kv_heads {kv_heads}")
        allowed = ", ".join(map(str, HEAD_DIMS))
        require(args.head_dim in HEAD_DIMS, f"--head_dim {args.head_dim} must be one of {allowed}")
        size = resolve_group_size(args.group_size, kv_heads, "--group_size")
        of_values = getattr(args, "value_group_size", None)
        if of_values is not None:
            of_values = resolve_group_size(of_values, kv_heads, "--value_group_size")
        return cls(args.num_heads, kv_heads, args.head_dim, size, of_values)

    @property
    def values(self) -> "Heads":
        """The same in the groups of values."""
        return replace(self, group_size=self.value_group_size or self.group_size)

    @property
    def groups(self) -> int:
        """Groups of kv heads."""
        return self.num_kv_heads // self.group_size

    @property
    def group_dim(self) -> int:
        """Numbers that a latent is rebuilt to."""
        return self.group_size * self.head_dim

    def ranks(self, total: int, flag: str) -> tuple[int, ...]:
        """A total rank shared out evenly.

        Raises:
            PaluError: if the kernels cannot take what each group gets.
        """
        from palu.core.validate import require

        step, most = RANK_MULTIPLE * self.groups, self.groups * self.group_dim
        require(
            0 < total <= most and total % step == 0,
            f"{flag} {total} must be a multiple of {step} ({RANK_MULTIPLE} for each of {self.groups} groups), "
            f"from {step} to {most}",
        )
        return (total // self.groups,) * self.groups

    def columns(self) -> dict[str, int]:
        """Entries of a row."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}


def latent_bytes(ranks: Sequence[int], bits: int) -> int:
    """Bytes of one token's latents: fp16 numbers, or codes with an fp16 scale and zero point per group."""
    from palu.kernels.quantize import Quantization

    return 2 * sum(ranks) if bits == 16 else Quantization(bits, tuple(ranks)).bytes_per_token


def score_cost(heads: Heads, ranks: Sequence[int], bits: int, batch: int, length: int) -> Cost:
    """Scores over latents: those read once, fp32 scores written; every key rebuilt, then its product with queries."""
    read, written = latent_bytes(ranks, bits), 4 * heads.num_heads
    flops = sum(ranks) * heads.group_dim + heads.num_heads * heads.head_dim
    return Cost(batch * length * (read + written), 2 * batch * length * flops)


def full_score_cost(heads: Heads, batch: int, length: int) -> Cost:
    """Scores over full fp16 keys: those read once, fp16 scores written; one product."""
    numbers = heads.num_kv_heads * heads.head_dim + heads.num_heads
    return Cost(2 * batch * length * numbers, 2 * batch * length * heads.num_heads * heads.head_dim)


def latent_attention_cost(
    heads: Heads,
    ranks: tuple[Sequence[int], Sequence[int]],
    bits: tuple[int, int],
    batch: int,
    length: int,
    absorbed: bool,
    exact: int = 0,
) -> Cost:
    """Attention over key and value latents of such bits, but for some exact tokens' of 16, each read once.

    FLOPs: keys rebuilt and multiplied with queries (with absorbed queries latents are), weighted sums of value latents;
    of interpolated keys there are fewer.
    """
    # Every query head meets the latents of its group, keys' where they are absorbed.
    key, value = (sum(side) * (heads.num_heads // len(side)) for side in ranks)
    if not absorbed:
        key = sum(ranks[0]) * heads.group_dim + heads.num_heads * heads.head_dim
    codes = sum(latent_bytes(side, each) for side, each in zip(ranks, bits, strict=True))
    read = (length - exact) * codes + exact * sum(latent_bytes(side, 16) for side in ranks)
    return Cost(batch * read, 2 * batch * length * (key + value))


def full_attention_cost(heads: Heads, batch: int, length: int) -> Cost:
    """Attention over full fp16 keys and values, each read once: two products."""
    read = 2 * 2 * heads.num_kv_heads * heads.head_dim
    return Cost(batch * length * read, 2 * 2 * batch * length * heads.num_heads * heads.head_dim)


def random_latents(
    batch: int, length: int, ranks: tuple[int, ...], bits: int, device: str, exact: tuple[int, int] = (0, 0)
) -> "Latents":
    """Random fp16 latents as a cache holds them: drawn, and quantised where asked, a piece at a time.

    exact: how many of the first and of the newest tokens stay as they are beside codes.
    """
    import torch

    from palu.kernels.quantize import Quantization
    from palu.nn.packed_buffer import MixedBuffer, PackedBuffer
    from palu.nn.token_buffer import TokenBuffer

    if bits == 16:
        buffer = TokenBuffer()
    elif any(exact):
        buffer = MixedBuffer(Quantization(bits, ranks), *exact)
    else:
        buffer = PackedBuffer(Quantization(bits, ranks))
    step = max(1, PIECE // (batch * sum(ranks)))
    for start in range(0, length, step):
        shape = (batch, min(step, length - start), sum(ranks))
        buffer.append(torch.randn(shape, device=device, dtype=torch.float16), length)
    return buffer.last(length)


def random_up(heads: Heads, ranks: tuple[int, ...], device: str) -> "Tensor":
    """An up factor, fp16 [group_dim, sum(ranks)], that rebuilds latents of variance one to such keys or values."""
    import torch

    up = torch.randn(heads.group_dim, sum(ranks), device=device) / math.sqrt(ranks[0])
    return up.half()


def rotation_of(heads: Heads, base: float, batch: int, length: int, device: str) -> "Rotation":
    """The rotary embedding of tokens 0 .. length - 1 in every row."""
    import torch

    from palu.kernels.rotation import Rotation

    positions = torch.arange(length, dtype=torch.int32, device=device).repeat(batch, 1)
    pairs = torch.arange(0, heads.head_dim, 2, device=device, dtype=torch.float32)
    return Rotation(positions, base ** (-pairs / heads.head_dim))


def relative_error(output: "Tensor", reference: Callable[[int], "Tensor"], groups: int, dim: int) -> float:
    """`||out - ref|| / ||ref||`, some groups of heads at a time, so that the reference fits into memory.

    Args:
        reference: float64 result of one group.
        dim: along which the groups lie side by side in `output`.
    """
    difference = norm = 0.0
    for group, part in enumerate(output.chunk(groups, dim=dim)):
        expected = reference(group)
        difference += float((part.double() - expected).square().sum())
        norm += float(expected.square().sum())
    return math.sqrt(difference / norm)


def in_float64(
    latents: "Latents", side: "LatentProjection", part: int, parts: int
) -> "tuple[Tensor, LatentProjection]":
    """One of `parts` equal parts of the groups in float64: latents [batch, length, ranks] and their up side.

    Of codes, what they stand for.
    """
    import torch

    from palu.kernels.latents import LatentProjection, dense

    each = len(side.ranks) // parts
    ranks, first = side.ranks[part * each : (part + 1) * each], sum(side.ranks[: part * each])
    up = None if side.up is None else side.up[:, first : first + sum(ranks)].double()
    bias = None if side.bias is None else side.bias.chunk(parts)[part].double()
    return dense(latents, torch.float64, first, sum(ranks)), LatentProjection(up, ranks, bias)


def common_columns(provider: str, bits: int, length: int, batch: int, baseline: bool) -> dict[str, Any]:
    """Entries that every latency row begins with."""
    return {
        "kind": "latency",
        "provider": provider,
        "prompt_len": length,
        "batch_size": batch,
        "bits": bits,
        "baseline": baseline,
    }
