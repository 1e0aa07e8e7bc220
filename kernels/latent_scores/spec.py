"""Shapes on which scores alone are checked, beside those of `palu.kernels.decode_attention.spec`."""

from palu.kernels.decode_attention.spec import Shape

# Ranks beyond 128, uneven ones too; three query heads per kv head; one group of all heads (J-LRD).
SHAPES = (
    Shape(2, 6, 2, 64, 1, 200, (160, 272), (32, 32)),
    Shape(1, 4, 2, 128, 1, 70, (32, 16), (32, 32)),
    Shape(1, 4, 4, 128, 2, 150, (272,), (32,)),
    Shape(1, 12, 4, 96, 1, 70, (48, 16), (32, 32)),
)
# Without a rotation, the query absorbed.
ABSORBED_SHAPES = (
    Shape(2, 4, 4, 64, 1, 63, (96, 32), (160,)),
    Shape(1, 6, 2, 128, 2, 140, (160,), (48,)),
)
