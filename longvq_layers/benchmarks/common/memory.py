"""Peak memory of one call, best measured in a process of its own.

Linux: the kernel's high-water mark of resident memory is reset before the call (`/proc/self/clear_refs`), and the
allocator of a child process is told to map every larger buffer by itself, so that freed memory leaves the process at
once. Elsewhere: the process's maximum so far, which only ever grows.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes; glibc, ignored elsewhere


def in_own_process(module: str, arguments: object) -> object:
    """What `python -m MODULE ARGUMENTS` prints as its last line; both are JSON.

    Raises:
        RuntimeError: that process failed.
    """
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-m", module, json.dumps(arguments)],
        env={**os.environ, **_ALLOCATOR, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def peak_of(call: Callable[[], object]) -> int | None:
    """Bytes of resident memory that one call needs on top of what is there before; None where that can't be read."""
    _return_freed()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark VmHWM
        before = _status("VmHWM")
        call()
        return max(_status("VmHWM") - before, 0)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def resident() -> int | None:
    """Bytes of resident memory of this process now; None where `/proc` doesn't tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else None


def _return_freed() -> None:
    """Memory that earlier calls have freed goes back to the system, so that it can't serve this one unnoticed."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc has it
        trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024  # given in KiB
    raise RuntimeError(f"/proc/self/status has no field {field}")
