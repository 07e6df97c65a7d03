"""Peak memory of one forward, measured in a process of its own: `python -m longvq_layers.demo.memory` is the child.

Linux: the kernel's high-water mark of resident memory is reset before the forward (`/proc/self/clear_refs`), and the
allocator is told to map every larger buffer by itself, so that freed memory leaves the process at once. Elsewhere: the
process's maximum so far, which only ever grows; lengths are measured in rising order, so it is still that of the
longest forward.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from longvq_layers.demo.settings import SpeedSettings

_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes; glibc, ignored elsewhere


def measure(settings: SpeedSettings, threads: int) -> dict[int, tuple[int, int]]:
    """Length -> peak extra bytes of one forward with (own, our) attention; {} where memory can't be read.

    Raises:
        RuntimeError: the measuring process failed.
    """
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-m", "longvq_layers.demo.memory", json.dumps({**asdict(settings), "threads": threads})],
        env={**os.environ, **_ALLOCATOR, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed:\n{child.stderr[-2000:]}")
    rows = json.loads(child.stdout.splitlines()[-1])
    return {length: (own, our) for length, own, our in rows}


def peak_of(forward: Callable[[], object]) -> int | None:
    """Bytes of resident memory that one call needs on top of what is there before; None where that can't be read."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark VmHWM
        before = _status("VmHWM")
        forward()
        return max(_status("VmHWM") - before, 0)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024  # given in KiB
    raise RuntimeError(f"/proc/self/status has no field {field}")


def _child(arguments: dict) -> list[tuple[int, int, int]]:
    import torch

    from longvq_layers.demo import speed

    torch.set_num_threads(arguments.pop("threads"))
    settings = SpeedSettings(**{**arguments, "lengths": tuple(arguments["lengths"])})
    own, ours = speed.build(settings)
    rows, grown = [], {"own": 0, "our": 0}
    high_water_mark_resets = Path("/proc/self/clear_refs").exists()
    with torch.inference_mode():
        for model in (own, ours):
            model(speed.tokens(settings.lengths[0]))  # threads, kernels and caches of the first call
        for name, model in (("own", own), ("our", ours)):
            for length in settings.lengths:
                ids = speed.tokens(length)
                peak = peak_of(lambda model=model, ids=ids: model(ids))
                if peak is None:
                    return []
                grown[name] = peak if high_water_mark_resets else grown[name] + peak
                rows.append((name, length, grown[name]))
    peaks = {(name, length): peak for name, length, peak in rows}
    return [(length, peaks["own", length], peaks["our", length]) for length in settings.lengths]


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
