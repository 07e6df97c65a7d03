"""Interleaved timing."""

from longvq_layers.benchmarks.common import timing


def test_a_slow_candidate_is_timed_in_three_rounds():
    calls = []
    times = timing.interleaved_times({"slow": lambda: calls.append(1), "none": lambda: None}, 6, budget=0.0)
    assert len(times["slow"]) == 3 and len(calls) == 4
    assert len(timing.interleaved_times({"slow": lambda: None}, 6)["slow"]) == 6
