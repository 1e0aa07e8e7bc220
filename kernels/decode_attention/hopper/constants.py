"""What Hopper's kernel is compiled with for the stretches of tokens of a launch."""

import functools
from typing import Any, NamedTuple

from palu.kernels.decode_attention.hopper.kind import Kind
from palu.kernels.decode_attention.hopper.plans import (
    CHUNK,
    FEW_BITS,
    WIDE_RANK,
    Plan,
    held_of,
    mode_of,
    scorers_of,
    whole_slots,
)
from palu.kernels.integers import cdiv, next_power_of_2
from palu.kernels.latent_scores.layout import DTYPES, divisor, even_rank
from palu.kernels.relaunch import Constants

# Registers of a thread that scores and of one that weighs values, by the mode, whether there are codes, and the groups
# of warps in all.
REGISTERS = {
    ("folded", False, 3): (200, 104), ("folded", True, 3): (184, 136),
    ("rotated", False, 3): (184, 136), ("rotated", True, 3): (168, 168),
    ("absorbed", False, 2): (240, 240), ("absorbed", True, 2): (240, 240), ("absorbed", True, 3): (152, 176),
    ("absorbed", True, 4): (104, 152),
    # Beside codes that more groups of warps score and weigh.
    ("absorbed", False, 3): (240, 240), ("absorbed", False, 4): (216, 216),
}  # fmt: skip
# Of three groups by the mode and the bits, where keys have WIDE_RANK latents or more, all of which a group that scores
# holds at once, and values at most so many chunks: sums of more need the registers.
FEW_CHUNKS = 3
WIDE_REGISTERS = {
    ("folded", 16): (216, 72), ("folded", 8): (192, 120), ("folded", 4): (200, 104),
    ("rotated", 16): (192, 120), ("rotated", 8): (168, 168), ("rotated", 4): (184, 136),
}  # fmt: skip
# Of absorbed keys' codes of more than WIDE_RANK latents, all of which become numbers at once, by the groups of warps.
WIDE_ABSORBED = {3: (200, 152), 4: (136, 120)}


class PlanConstants(NamedTuple):
    """How a stretch is scored, with windows of positions or without, and what is under way at a time: as `Plan`.

    span: tokens of a window, or 0. held: as `held_of` finds it.
    """

    mode: str
    span: int
    key_stages: int
    step: int
    value_stages: int
    held: int


class StretchConstants(NamedTuple):
    """What the programs of a stretch of tokens are compiled for.

    groups: programs for a row's heads: `shares` for each key group's, or one for those of `key_groups`. joined: key
    groups whose values are in the same latents. bits: of keys, value_bits: of values, which have codes if keys do.
    idle: groups of warps that only other stretches' programs need. scaled: codes of keys meet the factor times their
    scales, else scores are. key_copy, value_copy: as KIND in `planes`. exact: how all rows are computed, or, where
    there are windows, those with gaps; windows: the others.
    """

    groups: int
    shares: int
    joined: int
    key_groups: int
    kv: int
    queries: int
    query_slots: int
    slots: int
    query_rows: int
    width: int
    wide: int
    rank: int
    key_divisor: int
    chunks: int
    value_divisor: int
    rank_stride: int
    mask: str
    dtype: Any
    together: int
    columns: int
    bits: int
    value_bits: int
    asymmetric: bool
    scorers: int
    weighers: int
    idle: int
    score_registers: int
    value_registers: int
    whole: int
    scaled: bool
    sections: int
    has_bias: bool
    has_norm: bool
    even_keys: int
    even_values: int
    key_copy: int
    value_copy: int
    exact: PlanConstants
    windows: PlanConstants | None


@functools.lru_cache(maxsize=4096)
def constants_of(kind: Kind, plan: Plan, span: int, scaled: bool, beside: Kind | None) -> Constants:
    """What the kernel is compiled with, and its options.

    Args:
        kind: of the tokens that most programs have.
        plan: of calls with windows for these.
        span: tokens of a window, 0 without windows.
        scaled: whether codes of keys meet the factor times their scales.
        beside: of exact tokens beside them, or None.
    """
    main, exact = _of_stretch(kind, plan, span, scaled), None
    if beside is not None:
        exact = _of_stretch(beside, beside.plans(False, False)[0], 0, False, main.scorers + main.weighers)
    return Constants(MAIN=main, BESIDE=exact, num_warps=4, launch_pdl=True)


def _of_stretch(kind: Kind, plan: Plan, span: int, scaled: bool, groups: int = 0) -> StretchConstants:
    """groups: of warps that the launch has at least."""
    heads, bits, weighers = kind.heads, kind.bits, kind.weighers
    chunks = cdiv(max(kind.value_ranks), CHUNK)
    whole = whole_slots(heads, kind.value_bits, chunks)
    scorers = scorers_of(heads.mode, weighers, whole)
    warps = max(groups, scorers + weighers)
    if kind.sections > 1 and kind.rank >= WIDE_RANK and chunks <= FEW_CHUNKS:
        registers = WIDE_REGISTERS[heads.mode, max(bits, FEW_BITS)]
    elif heads.mode == "absorbed" and bits < 16 and kind.rank > WIDE_RANK and warps in WIDE_ABSORBED:
        registers = WIDE_ABSORBED[warps]
    else:
        registers = REGISTERS[heads.mode, bits < 16, warps]
    return StretchConstants(
        groups=kind.groups, shares=kind.shares, joined=len(kind.key_ranks) // len(kind.value_ranks),
        key_groups=kind.key_groups, kv=heads.kv, queries=heads.queries, query_slots=heads.query_slots,
        slots=heads.slots, query_rows=kind.rows_per_latent, width=kind.width, wide=next_power_of_2(kind.width),
        rank=kind.rank, key_divisor=divisor(kind.key_ranks), chunks=chunks, value_divisor=divisor(kind.value_ranks),
        rank_stride=max(kind.value_ranks), mask=kind.mask, dtype=DTYPES[kind.dtype], together=heads.together,
        columns=heads.columns, bits=bits, value_bits=kind.value_bits, asymmetric=kind.asymmetric, scorers=scorers,
        weighers=weighers, idle=warps - scorers - weighers, score_registers=registers[0],
        value_registers=registers[1], whole=whole, scaled=scaled,
        sections=kind.sections, has_bias=kind.has_bias, has_norm=kind.has_norm,
        even_keys=even_rank(kind.key_ranks), even_values=even_rank(kind.value_ranks),
        key_copy=kind.copies[0], value_copy=kind.copies[1],
        exact=_of_plan(kind, plan if span == 0 else kind.plans(False, False)[0], 0),
        windows=_of_plan(kind, plan, span) if span > 0 else None,
    )  # fmt: skip


def _of_plan(kind: Kind, plan: Plan, span: int) -> PlanConstants:
    mode = mode_of(kind.heads, span > 0)
    held = held_of(mode, kind.sections, plan.stays) if span > 0 else 1
    return PlanConstants(mode, span, plan.key_stages, plan.step, plan.value_stages, held)
