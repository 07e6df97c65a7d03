"""Find a PyTorch to compile against, without importing or installing one.

The extension needs torch's headers to compile and torch's library to link. Because of the stable ABI any torch >= 2.10
works, and the torch at run time may be another one.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MINIMUM = (2, 10)  # must equal `dependencies` in pyproject.toml

_WHERE_IS_TORCH = (
    "import importlib.util as u, json; s = u.find_spec('torch');"
    "print(json.dumps(list(s.submodule_search_locations or []) if s else []))"
)


@dataclass(frozen=True)
class Torch:
    """An installed torch."""

    root: Path  # .../site-packages/torch
    version: str

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


@functools.cache
def find_torch() -> Torch | None:
    """The first usable torch of: this process, the interpreter outside pip's build isolation, the active environment.

    pip isolates a build by a `sitecustomize` on the PYTHONPATH of the same interpreter. So this interpreter with `-I`,
    which ignores PYTHONPATH, sees the user's packages. Other tools build in an environment of their own; then the
    activated environment or the first Python on PATH is used.
    """
    for root in _torch_of_this_process():
        if torch := _usable(root):
            return torch
    for python in _interpreters():
        for root in _torch_of(python):
            if torch := _usable(root):
                return torch
    return None


def _torch_of_this_process() -> list[Path]:
    from importlib.util import find_spec

    spec = find_spec("torch")
    return [Path(p) for p in spec.submodule_search_locations or []] if spec else []


def _interpreters() -> list[str]:
    found = [sys.executable]
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            found.append(str(Path(prefix, "bin", "python")))
    found += [path for name in ("python3", "python") if (path := shutil.which(name))]
    return [python for python in dict.fromkeys(found) if Path(python).exists()]


def _torch_of(python: str) -> list[Path]:
    try:
        answer = subprocess.run(
            [python, "-I", "-c", _WHERE_IS_TORCH], capture_output=True, text=True, timeout=60, check=True
        )
        return [Path(p) for p in json.loads(answer.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []  # this Python does not work: use the next one


def _usable(root: Path) -> Torch | None:
    try:
        text = (root / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)([^'\"]*)['\"]", text)
    if not match or (int(match[1]), int(match[2])) < MINIMUM:
        return None
    if not (root / "include/torch/csrc/stable/library.h").exists():
        return None
    return Torch(root, f"{match[1]}.{match[2]}{match[3]}")
