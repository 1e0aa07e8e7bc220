"""From a script's flags to what the library compresses."""

import argparse
import dataclasses
from typing import Any


def default_text(model_id: str | None) -> str:
    """The text where none is named: the bundled one for the bundled model."""
    return "demo" if model_id is None else "wikitext2"


def asked_compression(args: argparse.Namespace, **given: Any) -> Any:
    """The library's CompressionConfig of all flags that have a field's name; `given`: fields that have no flag.

    Flags that were not given have its defaults, or with --palu its methods.

    Raises:
        PaluError: for a value that is not allowed, or a flag that --palu stands for.
    """
    from palu import CompressionConfig
    from palu.config import PALU_METHODS
    from palu.core.errors import PaluError

    fields = {field.name for field in dataclasses.fields(CompressionConfig)}
    asked = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    asked.setdefault("calib_dataset", default_text(args.model_id))
    if getattr(args, "palu", False):
        twice = [name for name in PALU_METHODS if name in asked]
        if twice:
            raise PaluError(f"--palu says what --{twice[0]} is; leave one of them out")
        asked |= PALU_METHODS
    return CompressionConfig(**(asked | given))
