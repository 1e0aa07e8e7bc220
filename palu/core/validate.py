"""Checks of what a user asked for."""

from typing import Any

from palu.core.errors import PaluError


def is_count(value: Any) -> bool:
    """Whether a value is a whole number (a boolean is not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def require(condition: bool, message: str) -> None:
    """Refuse what does not meet a condition.

    Raises:
        PaluError: with the message.
    """
    if not condition:
        raise PaluError(message)
