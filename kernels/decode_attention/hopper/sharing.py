"""How the tokens are shared out among programs."""

import functools

from palu.kernels.decode_attention.parts import COMBINE_PARTS
from palu.kernels.integers import cdiv

# Parts that are added up at once.
MOST_PARTS = 2 * COMBINE_PARTS
# What a program costs beside its tiles, in tiles; one of exact tokens beside codes, whose instructions are others.
START, START_BESIDE = 3, 8


@functools.lru_cache(maxsize=4096)
def parts_of(tiles: int, others: int, processors: int) -> int:
    """Programs that share the tiles, where there are so many others at a time: those that end first, if in waves."""
    most = max(1, min(tiles, MOST_PARTS, cdiv(4 * processors, others)))
    times = {n: cdiv(n * others, processors) * (cdiv(tiles, n) + START) for n in range(1, most + 1)}
    return min(times, key=lambda parts: (times[parts], parts))


@functools.lru_cache(maxsize=4096)
def parts_together(
    tiles: tuple[int, ...], others: tuple[int, ...], stored: tuple[int, ...], processors: int
) -> tuple[int, ...]:
    """As `parts_of`, of stretches of tokens whose programs are launched together, with as many tiles each at most.

    The others' programs run beside those of the first one. stored: parts that each program leaves.
    """
    times = {}
    for most in {cdiv(max(tiles), parts) for parts in range(1, MOST_PARTS + 1)}:
        counts = tuple(cdiv(own, most) for own in tiles)
        programs = [count * other for count, other in zip(counts, others, strict=True)]
        own, beside = min(tiles[0], most) + START, max(min(each, most) + START_BESIDE for each in tiles[1:])
        lasts = max(own, beside)
        if sum(programs) > processors:
            # Which of them begin first is not known.
            lasts = cdiv(programs[0], processors) * own + cdiv(sum(programs[1:]), processors) * beside
        left = sum(count * more for count, more in zip(counts, stored, strict=True))
        if left <= MOST_PARTS or most == max(tiles):
            times[counts] = lasts, own
    return min(times, key=lambda counts: (times[counts], counts))
