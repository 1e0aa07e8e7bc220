"""Arithmetic of launches; Triton's own takes microseconds a call, which every layer of every step would wait for."""


def cdiv(number: int, by: int) -> int:
    """A quotient, rounded up."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less; of positive numbers."""
    return 1 << (number - 1).bit_length()
