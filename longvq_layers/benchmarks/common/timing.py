"""Interleaved timing: the candidates take turns, so that a busy moment of the machine hits all of them."""

import statistics
import time
from collections.abc import Callable

_LEAST_ROUNDS = 3  # of a candidate that runs over its budget


def interleaved_medians(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate over `repeats` rounds, after one round that is not counted."""
    return {name: statistics.median(times) for name, times in interleaved_times(candidates, repeats).items()}


def interleaved_times(
    candidates: dict[str, Callable[[], object]], repeats: int, budget: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of each call, one list per candidate, after one round that is not counted.

    A candidate whose calls took more than `budget` seconds in all sits out the rounds after its third.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    for round_ in range(repeats + 1):
        for name, call in candidates.items():
            if spent[name] > budget and len(times[name]) >= _LEAST_ROUNDS:
                continue
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            spent[name] += seconds
            if round_ > 0:
                times[name].append(seconds)
    return times
