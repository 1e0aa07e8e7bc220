"""Modelling code that travels with a checkpoint, for programs that load it with `trust_remote_code=True`.

transformers loads such code as a flat folder of files that import each other relatively. The modules that a family's
classes need are copied under flat names (`palu.nn.rotary` -> `palu_nn_rotary.py`) with their imports rewritten; they
work whether or not palu is installed.
"""

import ast
import importlib.util
import re
from pathlib import Path

PACKAGE = "palu"
IMPORT = re.compile(rf"^(\s*)from ({PACKAGE}(?:\.\w+)+) import", flags=re.MULTILINE)


def flat_name(module: str) -> str:
    """File name without suffix of a module in a checkpoint."""
    return module.replace(".", "_")


def required_modules(entry: str) -> dict[str, str]:
    """Source of `entry` and of every module of this package that it imports, directly or not."""
    sources: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module in sources:
            continue
        sources[module] = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(sources[module])):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
                waiting.append(node.module)
    return sources


def write_remote_code(entry: str, directory: str | Path) -> None:
    """Write the code that module `entry` needs into `directory`.

    Does nothing for classes that were themselves loaded from a checkpoint: transformers copies their files.
    """
    if not entry.startswith(f"{PACKAGE}."):
        return
    for module, source in required_modules(entry).items():
        flat = IMPORT.sub(lambda match: f"{match[1]}from .{flat_name(match[2])} import", source)
        (Path(directory) / f"{flat_name(module)}.py").write_text(flat, encoding="utf-8")


def auto_map(adapter_module: str, config: str, model: str, causal_lm: str) -> dict[str, str]:
    """The config entry by which transformers' Auto classes find the code."""
    prefix = flat_name(adapter_module)
    return {
        "AutoConfig": f"{prefix}.{config}",
        "AutoModel": f"{prefix}.{model}",
        "AutoModelForCausalLM": f"{prefix}.{causal_lm}",
    }
