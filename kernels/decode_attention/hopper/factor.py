"""The up factor that codes of keys meet, and in what range its products stay."""

import torch
from torch import Tensor

from palu.kernels.decode_attention.hopper.operands import section_of
from palu.kernels.latent_scores.factors import bounded_factor, ordered_factor, unit_order
from palu.kernels.latents import LatentProjection
from palu.kernels.quantize import LARGEST_WHOLE_ZERO, LARGEST_ZERO, WHOLE_ZEROS

# Sums of fp16 at most: turned, they are up to the root of two as large.
MOST_SUM = 45000.0
# What a factor may be divided by, and queries be multiplied with, without leaving their range of fp16.
LEAST_POWER, MOST_POWER = 2.0**-6, 2.0**6


def section_order(columns: int, bits: int) -> list[int]:
    """`unit_order`, section by section."""
    wide = section_of(bits)
    return [start + latent for start in range(0, columns, wide) for latent in unit_order(wide, bits)]


def factor_of_codes(
    key: LatentProjection, rank: int, bits: int, dtype: torch.dtype, folded: bool, extras: bool, in_sections: bool
) -> tuple[Tensor, float, bool]:
    """The up factor in the order of the codes, what it is divided by, and whether codes have to meet it scaled.

    folded: queries are folded into it; extras: keys have biases or a norm, which count on keys as they are.
    in_sections: codes come section by section.
    """
    given = (key, rank, bits, dtype, section_order if in_sections else unit_order)
    if folded:
        return ordered_factor(*given), 1.0, False
    if not extras:
        # Codes without scales are added up in fp16, and turned.
        zero = LARGEST_WHOLE_ZERO if bits >= WHOLE_ZEROS else LARGEST_ZERO
        factor, power = bounded_factor(*given, MOST_SUM / (zero + 2**bits), LEAST_POWER)
        if power <= MOST_POWER:
            return factor, power, False
    return ordered_factor(*given), 1.0, True
