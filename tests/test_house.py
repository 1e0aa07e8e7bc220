"""The rules of the house: layers, styles, and living beside Hugging Face's `kernels`."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["compress.py", "run_ppl_eval.py", "run_lm_eval.py", "run_long_bench.py"]


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def test_imports_go_downwards_only():
    done = run(str(Path(sys.executable).with_name("lint-imports")))
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_kernels_import_nothing_of_the_library_but_kernels():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert module.split(".")[:2] == ["palu", "kernels"] or module.split(".")[0] not in ("palu", "utils"), (
                    path
                )


def test_ruff_is_content():
    ruff = str(Path(sys.executable).with_name("ruff"))
    for command in (("check",), ("format", "--check")):
        done = run(ruff, *command, ".")
        assert done.returncode == 0, done.stdout


def python_files():
    tracked = run("git", "ls-files", "*.py").stdout.splitlines()
    return [ROOT / name for name in tracked] or list(ROOT.glob("palu/**/*.py"))


def test_files_are_short():
    too_long = {str(path): n for path in python_files() if (n := len(path.read_text().splitlines())) > 330}
    assert not too_long


def test_the_library_prints_nothing_and_unpickles_nothing():
    offending = re.compile(r"^\s*print\(|\bpickle\b|torch\.load\(", flags=re.MULTILINE)
    for path in (ROOT / "palu").rglob("*.py"):
        assert not offending.search(path.read_text()), path


STAND_IN = """
class _Anything:
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, decorated=None, *args, **kwargs):
        return decorated


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Anything,), {})
"""


def fake_kernels_distribution(folder):
    """A distribution named `kernels` of a version that transformers accepts, with any name that it may import."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package, info = folder / "kernels", folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    return folder


CHECK = """
import kernels, sys
assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available()
import transformers.integrations.hub_kernels
from transformers import LlamaForCausalLM
import palu
from palu.kernels.decode_attention.op import decode_attention
"""


def test_transformers_and_palu_import_where_the_kernels_distribution_is_installed(tmp_path):
    folder = fake_kernels_distribution(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    # With -c, sys.path[0] is the checkout, as it is for the scripts: the folder kernels/ must not get in the way.
    done = run(sys.executable, "-c", "import sys; sys.path.insert(0, '')\n" + CHECK, str(folder), env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_where_the_kernels_distribution_is_installed(script, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(fake_kernels_distribution(tmp_path))}
    flag = "--model_id" if script == "compress.py" else "--model_name_or_path"
    done = run(sys.executable, script, flag, "./no-such-model", env=environment)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: ./no-such-model: no model directory (config.json is missing)"


def test_kernels_is_no_importable_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "palu" / "kernels").resolve() == (ROOT / "kernels").resolve()
