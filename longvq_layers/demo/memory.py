"""Peak memory of one forward, measured in a process of its own: `python -m longvq_layers.demo.memory` is the child.

`longvq_layers/benchmarks/common/memory.py` reads the memory. Lengths are measured in rising order, so that every
forward raises the high-water mark, even where the mark can't be reset.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from longvq_layers.benchmarks.common.child_process import answer
from longvq_layers.benchmarks.common.memory import high_water_mark_resets, peak_of, peaks_in_child
from longvq_layers.demo import random_bert
from longvq_layers.demo.settings import SpeedSettings


def measure(settings: SpeedSettings, threads: int) -> dict[int, tuple[int, int]]:
    """Length -> peak extra bytes of one forward with (own, our) attention; {} where memory can't be read.

    Raises:
        RuntimeError: the measuring process failed.
    """
    return {length: (own, our) for length, own, our in peaks_in_child(__name__, [asdict(settings), threads])}


def _measure(settings: dict[str, Any], threads: int) -> list[tuple[int, int, int]]:
    torch.set_num_threads(threads)
    return _peaks(SpeedSettings(**{**settings, "lengths": tuple(settings["lengths"])}))


def _peaks(settings: SpeedSettings) -> list[tuple[int, int, int]]:
    """(length, bytes of its own attention, bytes of ours) of every length; [] where memory can't be read."""
    models = random_bert.build(settings)
    peaks: list[list[int]] = []
    with torch.inference_mode():
        for model in models:
            model(random_bert.tokens(settings.lengths[0]))  # the first call makes threads, kernels and caches
        for model in models:
            grown: list[int] = []
            for length in settings.lengths:
                peak = peak_of(partial(model, random_bert.tokens(length)))
                if peak is None:
                    return []
                grown.append(peak if high_water_mark_resets() or not grown else grown[-1] + peak)
            peaks.append(grown)
    return list(zip(settings.lengths, *peaks, strict=True))


if __name__ == "__main__":
    answer(_measure)
