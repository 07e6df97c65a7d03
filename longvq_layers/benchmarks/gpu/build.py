"""Build the kernels for this GPU, run their tests on it, and run the checks under compute-sanitizer."""

import contextlib
import importlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from longvq_layers import _extension

_ROOT = Path(__file__).resolve().parents[3]
_TIMEOUT = 150  # seconds of a process that tests or checks


def build() -> str:
    """Build the libraries that are not loaded yet, if the sources are here; load them; say how they were built."""
    lines = []
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", _architecture())
    support = _ROOT / "csrc" / "build_support"
    if support.exists():
        sys.path.insert(0, str(support))
        builds = {
            _extension.LIBRARY: (_extension.is_loaded, importlib.import_module("native_library").build),
            _extension.CUDA_LIBRARY: (_extension.cuda_is_loaded, importlib.import_module("cuda_library").build),
        }
        for target, (is_loaded, build_library) in builds.items():
            if is_loaded():
                lines.append(f"{target.name}: loaded already, as it was installed")
                continue
            with contextlib.redirect_stdout(io.StringIO()):
                library, info, *_ = build_library()
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(".tmp")
            shutil.copy(library, unfinished)
            os.replace(unfinished, target)
            lines.append(f"{target.name}: built, {info}")
    _extension.load()
    if not _extension.load_cuda():
        raise RuntimeError(f"the CUDA kernels don't load: {_extension.cuda_load_error()}")
    return "\n".join([*lines, "loaded"])


def _architecture() -> str:
    """This GPU's architecture alone, which builds faster; for Hopper with its own instructions ("9.0a")."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def tests() -> str:
    """The last lines of the tests of the kernels on the GPU, or why they did not run."""
    if not (_ROOT / "tests" / "cuda").exists():
        return "left out: no tests beside the package"
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return f"left out: no {' and '.join(missing)} here"
    return _process([sys.executable, "-m", "pytest", "-q", "-k", "on_gpu", str(_ROOT / "tests" / "cuda")])


def sanitize(tool: str, out: Path) -> str:
    """The last lines of the checks under a tool of compute-sanitizer, or why they did not run."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return "left out: no compute-sanitizer on PATH"
    check = ["-m", "longvq_layers.benchmarks", "gpu", "--checks-only", "--out", str(out / tool)]
    return _process([sanitizer, "--tool", tool, "--error-exitcode", "3", sys.executable, *check])


def _process(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"not finished after {_TIMEOUT} s: {(error.stdout or b'')[-500:]!r}") from error
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}:\n{tail}")
    return tail
