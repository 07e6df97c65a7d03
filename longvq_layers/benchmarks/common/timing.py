"""Interleaved timing: the candidates take turns, so that other load on the machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping

Calls = dict[str, Callable[[], object]]
"""What is timed: name -> call."""

_LEAST_ROUNDS = 3  # of a candidate whose time budget is spent


def interleaved_medians(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate over `repeats` rounds, after one warm-up round."""
    return {name: statistics.median(times) for name, times in interleaved_times(candidates, repeats).items()}


def interleaved_times(
    candidates: Mapping[str, Callable[[], object]], repeats: int, budget: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of each call, one list per candidate, after one warm-up round.

    Args:
        candidates: name -> call.
        repeats: rounds.
        budget: seconds. A candidate that has spent them is timed in three rounds only.
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


def note_of_rounds(rounds: int, repeats: int, budget: float) -> str:
    """A note if a result has fewer rounds than were asked for; otherwise empty."""
    return "" if rounds == repeats else f"{rounds} rounds, {budget:g} s were up"
