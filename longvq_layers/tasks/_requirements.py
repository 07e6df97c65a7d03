"""Packages that only some tasks need."""

import importlib
from types import ModuleType


def need(task: str, module: str) -> ModuleType:
    """Import a module, or raise an ImportError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{task}: needs {module.partition('.')[0]}, which is not installed; "
            f'pip install "longvq-layers[tasks]" brings it'
        ) from error
