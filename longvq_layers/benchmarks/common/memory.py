"""Peak memory of one call, best measured in a process of its own.

Linux: the kernel's high-water mark of resident memory is reset before the call (`/proc/self/clear_refs`). The allocator
of a child process maps every larger buffer separately, so that freed memory returns to the system at once. On other
systems only the maximum since the start of the process is known, which never falls.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from longvq_layers.benchmarks.common.child_process import in_child_process

_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes; only glibc reads them
_RESET = Path("/proc/self/clear_refs")

NOT_READABLE = "not readable here"  # stands in tables where `peak_of` returned None


def peak_in_child(module: str, arguments: Sequence[object]) -> int | None:
    """Bytes that `module` measures with `peak_of` in a process of its own; None where memory can't be read."""
    peak: int | None = in_child_process(module, arguments, **_ALLOCATOR)
    return peak


def peaks_in_child(module: str, arguments: Sequence[object]) -> list[list[int]]:
    """The same for a module that measures several peaks and returns them as lists of numbers."""
    peaks: list[list[int]] = in_child_process(module, arguments, **_ALLOCATOR)
    return peaks


def peak_of(call: Callable[[], object]) -> int | None:
    """Peak bytes of resident memory during one call, above those before the call; None where they can't be read."""
    _return_freed()
    if high_water_mark_resets():
        _RESET.write_text("5")  # proc(5): resets the high-water mark VmHWM
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


def high_water_mark_resets() -> bool:
    """Whether the mark resets. If not, `peak_of` reads a maximum that never falls: it misses calls that need less."""
    return _RESET.exists()


def resident() -> int | None:
    """Bytes of resident memory of this process; None where `/proc` doesn't exist."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else None


def _return_freed() -> None:
    """Give memory that earlier calls freed back to the system; a call that reused it would seem to need none."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc has it
        trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024  # given in KiB
    raise RuntimeError(f"/proc/self/status has no field {field}")
