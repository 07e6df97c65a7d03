"""Interleaved timing: the candidates take turns, so that other load on the machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping

Calls = dict[str, Callable[[], object]]
"""What is timed: name -> call."""

_LEAST_ROUNDS = 3  # of a candidate whose time budget is spent


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved_times(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    budget: float = float("inf"),
    *,
    warm_up: int = 1,
    measure: Callable[[Callable[[], object]], float] = seconds_of,
) -> dict[str, list[float]]:
    """Seconds of each call, one list per candidate, after the warm-up.

    Args:
        candidates: name -> call.
        repeats: rounds.
        budget: seconds. A candidate that has spent them is timed in three rounds only.
        warm_up: rounds before those that count.
        measure: call -> seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    for round_ in range(repeats + warm_up):
        for name, call in candidates.items():
            if spent[name] > budget and len(times[name]) >= _LEAST_ROUNDS:
                continue
            seconds = measure(call)
            spent[name] += seconds
            if round_ >= warm_up:
                times[name].append(seconds)
    return times


def interleaved_medians(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_up: int = 1,
    measure: Callable[[Callable[[], object]], float] = seconds_of,
) -> dict[str, float]:
    """Median seconds of each candidate; the arguments are those of `interleaved_times`."""
    times = interleaved_times(candidates, repeats, warm_up=warm_up, measure=measure)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def note_of_rounds(rounds: int, repeats: int, budget: float) -> str:
    """A note if a result has fewer rounds than were asked for; otherwise empty."""
    return "" if rounds == repeats else f"{rounds} rounds, {budget:g} s were up"
