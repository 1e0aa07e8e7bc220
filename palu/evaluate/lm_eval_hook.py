"""Has lm-eval's own command find the model class `palu`: `lm_eval --model palu`.

lm-eval (0.4.13) knows the models of its own package, reads no entry points and can be given no module to import. So
this file is installed a second time, beside the packages, with a .pth file whose one line Python runs when it starts:
`import palu_lm_eval_hook`. That imports nothing further. When a program imports `lm_eval.models`, the name is added as
lm-eval adds its own: by a path, which is imported once the model is asked for.
"""

import sys

NAME, TARGET = "palu", "palu.evaluate.harness:PaluLM"


class AfterModels:
    """A finder of `lm_eval.models` alone, which registers the class once that module is loaded."""

    def __init__(self) -> None:
        self.asked = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """The module's usual spec, from the other finders, with a loader that goes on to `register`."""
        if name != "lm_eval.models" or self.asked:
            return None
        from importlib.util import find_spec

        # This finder is asked again for that, and leaves it to the others.
        self.asked = True
        try:
            spec = find_spec(name)
        finally:
            self.asked = False
        load = getattr(getattr(spec, "loader", None), "exec_module", None)
        if load is None:
            return None

        def load_and_register(module: object) -> None:
            load(module)
            register()

        spec.loader.exec_module = load_and_register
        return spec


def register() -> None:
    """Add the name to lm-eval's registry, unless it is there; a version that takes it otherwise goes without."""
    try:
        from lm_eval.api.registry import model_registry

        if NAME not in model_registry:
            model_registry.register(NAME, target=TARGET)
    except Exception as error:  # whatever another version may raise, its own models have to work
        import warnings

        warnings.warn(f"this version of lm-eval does not take the model class {NAME!r}: {error}", stacklevel=2)


if __name__ == "palu_lm_eval_hook":
    sys.meta_path.insert(0, AfterModels())
