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

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """The module's usual spec, from the other finders, with a loader that goes on to `register`."""
        if name != "lm_eval.models":
            return None
        sys.meta_path.remove(self)
        specs = (finder.find_spec(name, path, target) for finder in tuple(sys.meta_path))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_register(module: object) -> None:
                load(module)
                register()

            spec.loader.exec_module = load_and_register
        return spec


def register() -> None:
    """Add the name to lm-eval's registry, unless a version that does read entry points has it."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


if __name__ == "palu_lm_eval_hook":
    sys.meta_path.insert(0, AfterModels())
