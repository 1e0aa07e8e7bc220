"""From a script's flags to what the library compresses."""

import argparse
import dataclasses
from typing import Any


def default_text(model_id: str | None) -> str:
    """The text where none is named: the bundled one for the bundled model."""
    return "demo" if model_id is None else "wikitext2"


def asked_compression(args: argparse.Namespace, **given: Any) -> Any:
    """The library's CompressionConfig of all flags that have a field's name; `given`: fields that have no flag."""
    from palu import CompressionConfig

    fields = {field.name for field in dataclasses.fields(CompressionConfig)}
    asked = {name: value for name, value in vars(args).items() if name in fields}
    if asked["calib_dataset"] is None:
        asked["calib_dataset"] = default_text(args.model_id)
    return CompressionConfig(**(asked | given))
