"""The benchmark of a training step: its models have about equal sizes, its report judges the targets."""

import pytest

from longvq_layers.benchmarks.step import command as step
from longvq_layers.benchmarks.step import memory
from longvq_layers.benchmarks.step.models import MODELS, Sizes, build
from tests.benchmarks.command_line import run


def test_table_csv_and_plot(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "peak_of_step", lambda name, *args: 3_000_000 if name == "dense" else 1_000_000)
    sizes = ["--lengths", "32", "64", "--dense-up-to", "32", "--d-model", "16", "--depth", "1", "--codes", "8"]
    run(monkeypatch, "step", *sizes, "--repeats", "1", "--out", str(tmp_path))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [line for line in lines if line.split("|")[1].strip() in ("32", "64")]
    ours = ["longvq", "longvq, recompute"]
    assert [line.split("|")[2].strip() for line in rows] == [*ours, "fused", "dense", *ours, "fused"]
    assert rows[3].count(", 3.00x") == 2
    assert (tmp_path / "step.png").stat().st_size > 10_000
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 8


def test_targets_are_judged():
    rows = [
        step.Row(4096, "longvq", 1, 1.0, 3, 10),
        step.Row(4096, "longvq, recompute", 1, 1.05, 3, 9),
        step.Row(4096, "fused", 1, 1.9, 3, 10),
        step.Row(4096, "dense", 1, 5.4, 3, 99),
    ]
    report = step._report(rows)
    assert "| time against fused, L = 4096 | ≥ 2x | 1.90x, not met | 1.81x, not met |" in report
    assert "| time against dense, L = 4096 | ≥ 5.3x | 5.40x, met | 5.14x, not met |" in report
    assert "| memory against dense, L = 4096 | ≥ 10x | 9.90x, not met | 11.00x, met |" in report


def test_a_step_changes_every_parameter():
    for name in MODELS:
        model = build(name, Sizes(16, 2, 8, 4))
        before = [parameter.clone() for parameter in model.parameters()]
        step.training_step(model.train(), 40)()
        assert all((new != old).any() for new, old in zip(model.parameters(), before, strict=True)), name


def test_sizes_are_about_equal():
    sizes = {name: sum(p.numel() for p in build(name, Sizes(256, 4, 256, 64)).parameters()) for name in MODELS}
    assert max(sizes.values()) < 1.15 * min(sizes.values()), sizes


@pytest.mark.slow
def test_memory_is_that_of_the_step():
    few, many = (memory.peak_of_step("dense", Sizes(32, 1, 8, 4), length, 1) for length in (512, 2048))
    if few is None:
        pytest.skip("memory can't be read here")
    assert many > 4 * 2048 * 2048 * 4  # a row of weights for each of the four heads
    assert few < many / 4
