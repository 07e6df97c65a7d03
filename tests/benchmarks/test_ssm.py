"""The benchmark of the scan runs, refuses wrong results and judges its targets; its measurements are not asserted."""

import csv
import subprocess
import sys

import pytest
import torch

from longvq_layers import ops
from longvq_layers.benchmarks.ssm import memory, peers, targets
from longvq_layers.benchmarks.ssm.rows import PEERS, TIMED, Row
from tests.benchmarks.command_line import run


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A function that runs `ssm --quick` with more options and a fixed memory, and returns its folder."""
    monkeypatch.setattr(memory, "peak_of_backward", lambda *args: 1000)

    def call(*options):
        run(monkeypatch, "ssm", "--quick", *["--repeats", "1", "--backend", "torch", "--out"], str(tmp_path), *options)
        return tmp_path

    return call


def test_tables_csv_and_plot(quick, capsys):
    pytest.importorskip("matplotlib")
    out = quick()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert sum(line.startswith("|:---|") for line in lines) == 3
    cases = [f"| {case} | {b} | 16 | {n} |" for case, b, n in (("forward", 1, 64), ("forward", 1, 256))]
    for start in (*cases, "| forward + backward | 2 | 16 | 64 |", "| step, H = 16", "| extra memory of forward"):
        assert sum(line.startswith(start) for line in lines) == 1, start
    # Targets are for the full sizes.
    assert not any(line.endswith("met |") for line in lines)
    assert (out / "ssm.png").stat().st_size > 10_000

    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = "case B H L method seconds rounds gflops gbytes difference extra_bytes note backend threads torch"
    assert list(rows[0]) == columns.split()
    for case in TIMED:
        methods = {row["method"] for row in rows if row["case"] == case}
        assert methods == {"ours", *PEERS, "matmul"}
    assert [row["L"] for row in rows if row["case"] == "scaling"] == ["64", "256", "1024"]
    assert all(float(row["seconds"]) > 0 for row in rows if row["case"] not in ("memory", "step memory"))


def test_longer_sequences_are_left_out(quick, capsys):
    with (quick("--max-length", "64") / "results.csv").open() as file:
        assert {int(row["L"]) for row in csv.DictReader(file) if row["case"] != "step memory"} == {1, 64}


def test_without_matplotlib_there_is_no_plot(quick, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = quick("--max-length", "64")
    assert "no plot" in capsys.readouterr().out and (out / "results.csv").exists() and not (out / "ssm.png").exists()


def test_a_missing_kernel_is_named(quick, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("ssm_scan has no compiled kernel yet")

    monkeypatch.setattr(ops, "ssm_scan", refuse)
    with pytest.raises(SystemExit, match="nothing to measure: ssm_scan has no compiled kernel"):
        quick("--backend", "native")


@pytest.mark.parametrize("case", TIMED)
@pytest.mark.parametrize("wrong", ["vandermonde", "fft", "torch"])
def test_refuses_to_time_a_wrong_result(case, wrong):
    problem = peers.Problem(2, 3, 20, "torch")
    calls, skipped = problem.peers(case)
    assert not skipped
    assert problem.differences(calls, case).keys() == {"vandermonde", "fft", "torch"}
    right = calls[wrong]

    def changed(index):
        result = right()
        for place, x in enumerate(result if isinstance(result, list) else [result]):
            if place == index:
                last = (-1,) * x.dim()
                x[last] = x[last] * 1.1 + 0.1
        return result

    results = 1 if case == "forward" else len(right())
    # The gradient that fft has for its given kernel has no counterpart.
    for index in range(min(results, 3) if wrong == "fft" else results):
        calls[wrong] = lambda index=index: changed(index)
        with pytest.raises(AssertionError, match=f"differs from {wrong}"):
            problem.differences(calls, case)
    calls[wrong] = lambda: [x * torch.nan for x in right()] if case != "forward" else right() * torch.nan
    with pytest.raises(AssertionError, match="nan"):
        problem.differences(calls, case)


def test_a_peer_that_needs_too_much_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(peers, "MOST_BYTES", 1000)
    calls, skipped = peers.Problem(1, 2, 50, "torch").peers("forward")
    assert "vandermonde" not in calls and "would take about" in skipped["vandermonde"]


def test_targets_are_met_or_not():
    def rows(factor, step, ratio, multiple):
        timed = {"ours": 1.0, "vandermonde": factor * 100, "fft": factor * 4}
        yield from (Row("forward", 1, 2, 4096, name, seconds) for name, seconds in timed.items())
        yield Row("step", 1, 2, 1, "ours", step)
        yield from (Row("scaling", 1, 2, length, "ours", length * s) for length, s in ((8, 1.0), (32, ratio)))
        yield Row("memory", 1, 2, 10, "ours", extra_bytes=int(multiple * 80))

    good = list(targets.targets(list(rows(1.01, 49e-6, 1.29, 2.9))))
    bad = list(targets.targets(list(rows(0.99, 51e-6, 1.31, 3.1))))
    assert [line[-1] for line in good] == ["met"] * 5 and [line[-1] for line in bad] == ["not met"] * 5


def test_memory_is_measured_in_a_process_of_its_own():
    peak = memory.peak_of_backward(1, 16, 8192, "torch", 1)
    assert peak is None or 2 * 4 * 16 * 8192 <= peak < 2**28  # y and the gradient of u at least


def test_an_error_of_the_measuring_process_is_shown(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "no room"))
    with pytest.raises(RuntimeError, match="no room"):
        memory.peak_of_backward(1, 2, 8, "torch", 1)
