"""The benchmark of the assignment to codes prints its table and refuses wrong results."""

import pytest
import torch

from longvq_layers.benchmarks import assign
from tests.benchmarks.command_line import run


def test_it_prints_one_table(monkeypatch, capsys):
    sizes = ["--heads", "2", "--lengths", "64", "128", "--codes", "32", "--repeats", "1"]
    monkeypatch.setattr(assign, "MATMUL_SIZE", 64)
    run(monkeypatch, "assign", *sizes)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and table[2].startswith("| 64 | 32 |") and table[3].startswith("| 128 | 32 |")


def test_refuses_to_time_a_wrong_result():
    k, codebook = torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(0)), torch.eye(4)[None]
    right = (k @ codebook.mT).argmax(-1)
    assign._check_equal(k, codebook, right, right)
    with pytest.raises(AssertionError):
        assign._check_equal(k, codebook, (right + 1) % 4, right)
