"""Experiments: variants are trained alike, finished runs are not repeated, the table shows their results."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longvq_layers import tasks
from longvq_layers.experiments import __main__ as command
from longvq_layers.experiments import report, runner
from longvq_layers.experiments.suites import SUITES, Suite
from longvq_layers.train import model

TINY = Suite(
    "Copying",
    "accuracy",
    {
        "task": "selective-copying",
        "task_options": {"length": 16, "memorise": 2, "vocab": 6},
        "d_model": 8,
        "depth": 1,
        "steps": 4,
        "batch_size": 2,
        "eval_every": 2,
        "eval_batches": 1,
    },
    {"ours, small": {"block": "longvq", "block_options": {"num_codes": 4}}, "theirs": {"block": "transformer"}},
)


@pytest.mark.slow
def test_a_suite_is_run_reported_and_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SUITES, "tiny", lambda: TINY)
    arguments = ["tiny", "--seeds", "0", "1", "--jobs", "2", "--out", str(tmp_path)]
    command.main(arguments)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and {line.split("|")[1].strip() for line in table[2:]} == {"ours, small", "theirs"}
    assert (tmp_path / "tiny.png").stat().st_size > 5_000
    files = sorted(tmp_path.glob("*/result.json"))
    assert [file.parent.name for file in files] == ["ours-small-0", "ours-small-1", "theirs-0", "theirs-1"]
    results = [json.loads(file.read_text()) for file in files]
    assert all(result["steps"] == 4 for result in results)
    lines = {line.label: line for line in report.collect(TINY, tmp_path, [0, 1], {"ours, small": 0.01, "theirs": 0.02})}
    assert lines["theirs"].scores == tuple(result["test"]["accuracy"] for result in results[2:])
    assert lines["theirs"].milliseconds == 20
    assert lines["theirs"].parameters == results[2]["parameters"]

    monkeypatch.setattr(runner, "_start", lambda *args: pytest.fail("a finished run was started again"))
    command.main(arguments)


def test_zero_jobs_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["digits", "--jobs", "0"])
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_end_with_the_command(tmp_path):
    arguments = ["-m", "longvq_layers.experiments", "digits", "--jobs", "1", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "longvq-0" / "log.csv"
    while not log.exists() and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 143
    running = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(path)]
    assert log.exists() and not running


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


@pytest.mark.slow
def test_a_failed_run_is_reported_with_its_output(tmp_path):
    broken = Suite("", "accuracy", TINY.common, {"wrong": {"block": "longvq", "block_options": {"num_codes": 0}}})
    with pytest.raises(
        RuntimeError, match=r"1 runs failed; the first, wrong, seed 0:(?s:.*)num_codes must be at least 1"
    ):
        runner.run_all(broken, tmp_path, [0], 1, lambda line: None)


def test_the_better_score_comes_first():
    lines = [report.Line("low", 1, 1, 1.0, (0.1, 0.3)), report.Line("high", 1, 1, 1.0, (0.9,))]
    accuracy = report.markdown(TINY, lines).splitlines()
    bits = report.markdown(Suite("", "bits_per_byte", {}, {}), lines).splitlines()
    assert accuracy[2].startswith("| high") and bits[2].startswith("| low")
    assert "| 0.2000 | 0.1000, 0.3000 |" in bits[2]


@pytest.mark.parametrize("name", SUITES)
def test_variants_differ_only_in_blocks_and_rates(name):
    suite = SUITES[name]()
    settings = [suite.settings(label, 0) for label in suite.variants]
    assert {frozenset(changes) <= {"block", "block_options", "lr"} for changes in suite.variants.values()} == {True}
    sizes = {}
    for label, one in zip(suite.variants, settings, strict=True):
        sizes[label] = model.count(model.build(one, tasks.get(one.task, **one.task_options)))
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes
