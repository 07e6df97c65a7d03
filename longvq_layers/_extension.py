"""Find and load the compiled library; keep the reason if that fails.

`import longvq_layers` calls :func:`load` once. :func:`load` never raises: without the library every operator runs its
PyTorch code, and :func:`load_error` gives the reason. A library that was never built causes no warning; a library that
exists but can't be used causes a single warning.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import struct
import warnings
from pathlib import Path
from typing import Any

DISABLE = "LONGVQ_DISABLE_EXTENSION"
ANOTHER_LIBRARY = "LONGVQ_LIBRARY"  # path of a library to load instead of the package's, for example a sanitized build
CPU_CAPABILITY = "LONGVQ_CPU_CAPABILITY"  # default | avx2 | avx512, read by the library itself

_PACKAGE = Path(__file__).resolve().parent
IS_ANOTHER_LIBRARY = bool(os.environ.get(ANOTHER_LIBRARY))
LIBRARY = Path(os.environ[ANOTHER_LIBRARY]).absolute() if IS_ANOTHER_LIBRARY else _PACKAGE / "lib" / "liblongvq.so"
CUDA_LIBRARY = _PACKAGE / "lib" / "liblongvq_cuda.so"
BUILD_INFO = _PACKAGE / "_build_info.json"  # describes the package's library

_library: ctypes.CDLL | None = None
_error: str | None = "not loaded yet: import longvq_layers loads it"
_cuda_library: ctypes.CDLL | None = None
_cuda_error: str | None = _error


def load() -> bool:
    """Load the library if it is not loaded yet. Returns whether it is loaded now."""
    global _library, _error
    if _library is not None:
        return True
    _error = _why_not_to_try()
    if _error is not None:
        return False
    try:
        _library = _open(LIBRARY, "cpu")
        _error = None
    except (OSError, RuntimeError) as error:
        name = f"{ANOTHER_LIBRARY}={LIBRARY}" if IS_ANOTHER_LIBRARY else LIBRARY
        _error = f"{name} does not load: {_explain(LIBRARY, error)}"
        warnings.warn(
            f"the native kernels of longvq_layers are not available, PyTorch serves instead. {_error}",
            RuntimeWarning,
            stacklevel=2,
        )
    return _library is not None


def load_cuda() -> bool:
    """Load the library of the CUDA kernels if it exists and torch has CUDA. Returns whether it is loaded now."""
    import torch

    global _cuda_library, _cuda_error
    if _cuda_library is not None:
        return True
    built = build_info().get("cuda") or {}
    if _library is None:
        _cuda_error = _error
    elif not CUDA_LIBRARY.exists():
        _cuda_error = f"not built: {built.get('reason') or 'the file is missing; reinstall longvq-layers'}"
    elif not torch.backends.cuda.is_built():  # asking for a GPU would initialise CUDA and break later forks
        _cuda_error = "this torch was built without CUDA"
    else:
        try:
            _cuda_library = _open(CUDA_LIBRARY, "cuda")
            _cuda_error = None
        except (OSError, RuntimeError) as error:
            _cuda_error = f"{CUDA_LIBRARY} does not load: {_explain(CUDA_LIBRARY, error)}"
            warnings.warn(
                f"the CUDA kernels of longvq_layers are not available. {_cuda_error}", RuntimeWarning, stacklevel=2
            )
    return _cuda_library is not None


def cuda_is_loaded() -> bool:
    """Whether the CUDA kernels are registered with PyTorch in this process."""
    return _cuda_library is not None


def cuda_load_error() -> str | None:
    """Why the CUDA kernels are not loaded; None if they are."""
    return _cuda_error


def is_loaded() -> bool:
    """Whether the compiled kernels are registered with PyTorch in this process."""
    return _library is not None


def load_error() -> str | None:
    """Why the library is not loaded; None if it is."""
    return _error


def cpu_capability() -> str | None:
    """The instruction set that the loaded kernels use: "default", "avx2" or "avx512"; None without the library."""
    return _text(_library, "longvq_cpu_capability") if _library is not None else None


@functools.cache
def build_info() -> dict[str, Any]:
    """The record of the installation: torch, compiler, flags, instruction sets, and under `"cuda"` nvcc.

    Without a library `"built"` is False and `"reason"` gives the reason.
    """
    try:
        info = json.loads(BUILD_INFO.read_text())
    except FileNotFoundError:
        return {"built": False, "reason": "this is a source tree that was not installed: pip install -e ."}
    except (OSError, ValueError) as error:
        return {"built": False, "reason": f"{BUILD_INFO} can't be read: {error}"}
    if not isinstance(info, dict):
        return {"built": False, "reason": f"{BUILD_INFO} holds no object"}
    return info


def _why_not_to_try() -> str | None:
    if os.environ.get(DISABLE, "") not in ("", "0"):
        return f"disabled by {DISABLE}={os.environ[DISABLE]}"
    if LIBRARY.exists():
        return None
    if IS_ANOTHER_LIBRARY:  # the user named a library: never load another one instead
        error = f"missing: {ANOTHER_LIBRARY}={LIBRARY} does not exist"
    elif build_info().get("built"):
        error = f"missing: {LIBRARY} was built and installed but is no longer there; reinstall longvq-layers"
    else:
        return f"not built: {build_info().get('reason')}"
    warnings.warn(f"the native kernels of longvq_layers are {error}", RuntimeWarning, stacklevel=3)
    return error


def _open(path: Path, device: str) -> ctypes.CDLL:
    """Load a library, which registers its kernels for a device type, and check that all were registered."""
    import torch

    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))  # the library that is loaded already, to call its C functions
    try:
        refused = _text(library, "longvq_cpu_capability_error") if device == "cpu" else None
        operators = _text(library, f"longvq_{device}_operators")
    except AttributeError as error:
        raise RuntimeError(f"it is not the library of longvq_layers ({error})") from error
    if refused:
        raise RuntimeError(refused)
    for name in (operators or "").split():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"longvq::{name}", device.upper()):
            raise RuntimeError(f"it did not register longvq::{name} for {device.upper()} tensors")
    return library


def _text(library: ctypes.CDLL, function: str) -> str | None:
    entry = getattr(library, function)
    entry.restype, entry.argtypes = ctypes.c_char_p, ()
    answer = entry()
    return None if answer is None else answer.decode()


# e_machine of the ELF header, for processors that PyTorch has wheels for.
_ELF_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64", 0x03: "i386", 0x15: "ppc64", 0x16: "s390x", 0xF3: "riscv64"}


def _explain(path: Path, error: Exception) -> str:
    """The loader's message, with its meaning in front."""
    if not isinstance(error, OSError):
        return str(error)
    message = str(error.__cause__ or error)  # torch wraps the error of the loader, whose message has the details
    if "undefined symbol" in message:
        return f"undefined symbol: it needs a newer torch than the one installed, or was built wrongly ({message})"
    try:
        with path.open("rb") as file:
            header = file.read(20)
    except OSError as unreadable:
        return f"unreadable ({unreadable})"
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return f"corrupt: the file is no shared library ({message})"
    (machine,) = struct.unpack("<H" if header[5] == 1 else ">H", header[18:20])
    built_for = _ELF_MACHINES.get(machine, f"machine {machine:#x}")
    here = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if built_for != here:
        return f"built for another architecture, {built_for} instead of {here} ({message})"
    return message
