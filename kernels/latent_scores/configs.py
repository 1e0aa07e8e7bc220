"""How the score kernel is launched on a device, by what its blocks can hold."""

import itertools
from typing import NamedTuple

from palu.kernels.latent_scores.factors import PART
from palu.kernels.latent_scores.layout import LARGE_BLOCK, HeadBlocks
from palu.kernels.latents import Stretch
from palu.kernels.quantize import PackedLatents
from palu.kernels.rotation import Interpolation

# Tokens of a tile where all pairs are rebuilt.
EXACT_TILE = 64


class Config(NamedTuple):
    """Programs per multiprocessor, tokens of a tile, warps per program, tiles under way."""

    programs: int
    tile: int
    warps: int
    stages: int


# In the order of preference, of which the first that fits into a block's shared memory is taken; measured on one H200.
# Numbers need much shared memory under way, codes many programs; of latents wider than PART both need more. Small
# blocks: see LARGE_BLOCK.
CONFIGS = {
    "numbers": (Config(1, 128, 8, 3), Config(1, 128, 8, 2), Config(1, 64, 4, 2)),
    "numbers, small blocks": (Config(2, 64, 4, 2),),
    "codes": (Config(2, 64, 4, 3), Config(2, 64, 4, 2)),
    "wide codes": (Config(1, 128, 8, 2), Config(1, 64, 4, 2)),
}
# What the full search tries beside them.
GRID = tuple(Config(*each) for each in itertools.product((1, 2, 3), (64, 128), (4, 8), (1, 2, 3, 4)))
ONE_STAGE = Config(1, 64, 4, 1)
# Where columns are read again for every tile, and where all pairs are rebuilt.
STREAMED, EXACT = Config(2, 64, 4, 1), Config(2, EXACT_TILE, 4, 1)
# What programs keep in shared memory for the compiler, and latents of which all columns are kept at most.
RESERVED, MOST_KEPT = 8 << 10, 256


def configs_for(
    part: Stretch,
    rank: int,
    heads: HeadBlocks,
    interpolation: Interpolation | None,
    absorbed: bool,
    memory: int,
    all_of_them: bool,
) -> list[tuple[Config, bool]]:
    """Launch configurations for latents of some padded rank, the best first, and whether programs keep all columns.

    Columns are what latents are multiplied with; otherwise they are read again for every tile. memory: shared memory
    that a block may have. One configuration, or all that fit.
    """
    if interpolation is None and not absorbed:
        others = [config for config in GRID if config.tile == EXACT_TILE and config.stages == 1]
        return [(config, False) for config in (EXACT, *(others if all_of_them else ()))]
    packed = isinstance(part, PackedLatents)
    itemsize = 2 if packed else part.itemsize
    if itemsize > 2:
        candidates: tuple[Config, ...] = ()
    elif packed:
        candidates = CONFIGS["wide codes" if rank > PART else "codes"]
    else:
        candidates = CONFIGS["numbers" if memory >= LARGE_BLOCK else "numbers, small blocks"]
    candidates = (*candidates, ONE_STAGE, *(GRID if all_of_them else ()))
    bits = part.quantization.bits if packed else 8 * itemsize
    fitting = []
    if rank <= (MOST_KEPT if memory >= LARGE_BLOCK else PART) or absorbed:
        for config in dict.fromkeys(candidates):
            if _shared_memory(config, rank, bits, itemsize, heads, interpolation, memory) <= memory - RESERVED:
                fitting.append((config, True))
    fitting.append((STREAMED, False))
    return fitting if all_of_them else fitting[:1]


def _shared_memory(
    config: Config, rank: int, bits: int, itemsize: int, heads: HeadBlocks, interpolation: Interpolation | None,
    memory: int,
) -> int:  # fmt: skip
    """Bytes of shared memory, about: columns of fast pairs, and for every tile under way latents, columns, tables."""
    if interpolation is None:
        return heads.slots * rank * itemsize + config.stages * config.tile * rank * bits // 8
    slow = heads.kv * heads.query_slots * interpolation.columns
    tables = config.tile * (2 * interpolation.fast + interpolation.columns) * itemsize
    tile = config.tile * rank * bits // 8 + slow * rank * itemsize + tables
    # Matrix units of small blocks' devices take both sides from registers, where the compiler leaves what is kept.
    kept = heads.kv * 2 * interpolation.fast * rank * itemsize if memory >= LARGE_BLOCK else 0
    return kept + config.stages * tile
