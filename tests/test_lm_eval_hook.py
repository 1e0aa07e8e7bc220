"""What installing the package adds to Python's start, and to the programs of its environment."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def test_what_is_read_when_python_starts_imports_nothing_and_leaves_other_models_alone():
    before = "import sys; print(sorted(m for m in sys.modules if m.startswith(('palu', 'torch', 'lm_eval'))))"
    looked_up = "import importlib.util; print(importlib.util.find_spec('lm_eval.models').name)"
    names = "from lm_eval.api.registry import model_registry as r; print(set(r.keys()) - set(m.MODEL_MAPPING), r['hf'])"
    code = "; ".join((before, looked_up, "import lm_eval.models as m", names, "print('palu' in sys.modules)"))
    found = printed_elsewhere(code)
    hf = "<class 'lm_eval.models.huggingface.HFLM'>"
    assert found[-4:] == ["['palu_lm_eval_hook']", "lm_eval.models", "{'palu'} " + hf, "False"]


def test_a_version_of_lm_eval_without_such_a_registry_works_all_the_same(tmp_path):
    for module in ("__init__", "models/__init__", "api/__init__", "api/registry"):
        (tmp_path / "lm_eval" / module).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "lm_eval" / f"{module}.py").write_text("")
    found = printed_elsewhere(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lm_eval.models; print('there')"
    )
    assert found == ["there"]
    # A folder without code has no loader.
    (tmp_path / "lm_eval" / "models" / "__init__.py").unlink()
    found = printed_elsewhere(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lm_eval.models; print('there')"
    )
    assert found == ["there"]


def test_programs_elsewhere_find_palu_and_nothing_else_of_the_checkout():
    names = [path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"]
    code = f"import importlib.util; print([n for n in {names!r} if n.isidentifier() and importlib.util.find_spec(n)])"
    assert printed_elsewhere(code) == ["['palu']"]


def printed_elsewhere(code):
    """Lines that a program prints outside of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=True)
    return done.stdout.splitlines()
