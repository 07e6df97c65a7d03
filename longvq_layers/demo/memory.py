"""Peak memory of one forward, measured in a process of its own: `python -m longvq_layers.demo.memory` is the child.

How it is read: `longvq_layers/benchmarks/memory.py`. Lengths are measured in rising order, so where the high-water mark
can't be reset it is still that of the longest forward.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from longvq_layers.benchmarks.memory import in_own_process, peak_of
from longvq_layers.demo.settings import SpeedSettings


def measure(settings: SpeedSettings, threads: int) -> dict[int, tuple[int, int]]:
    """Length -> peak extra bytes of one forward with (own, our) attention; {} where memory can't be read.

    Raises:
        RuntimeError: the measuring process failed.
    """
    rows = in_own_process(__name__, {**asdict(settings), "threads": threads})
    return {length: (own, our) for length, own, our in rows}


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
