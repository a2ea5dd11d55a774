"""Registers the models in timm and repairs transformers' DiNAT in every process of `dinat-triton run`.

Python imports this at its start wherever this folder is on PYTHONPATH, so processes that a script spawns do it too. It
waits for them to import timm or transformers, and imports nothing itself: most processes need neither.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class AfterImport:
    """A finder that finds a package as the others do, and has a function called once the package is imported."""

    def __init__(self, package: str, function: Callable[[], None]):
        self.package, self.function = package, function

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.package:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                self.function()

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def register() -> None:
    import dinat_triton  # noqa: F401


def repair() -> None:
    from dinat_triton.integrations.transformers import enable

    try:
        enable()
    except RuntimeError as error:  # a script may import transformers for something else
        warnings.warn(f"transformers' DiNAT is left as it is: {error}", stacklevel=2)


def import_hidden() -> None:
    """Imports the sitecustomize that this one hides, if there is one."""
    here = Path(__file__).parent
    spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if Path(entry).absolute() != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if importlib.util.find_spec("dinat_triton") is not None:  # PYTHONPATH may have reached another Python's process
    sys.meta_path[:0] = [AfterImport("timm", register), AfterImport("transformers", repair)]
if __name__ == "sitecustomize":
    import_hidden()
