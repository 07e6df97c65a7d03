"""The benchmark of generation, at sizes that take seconds."""

import pytest
import torch

from longvq_layers.benchmarks import generation
from tests.benchmarks.command_line import parsed


@pytest.fixture(scope="module")
def models():
    """A Llama with its own attention and with 8 codes and a window of 16."""
    return generation._models(8, 16)


def test_table_csv_and_plot(models, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generation, "_models", lambda codes, window: models if (codes, window) == (8, 16) else None)
    words = ("--lengths", "64", "200", "--codes", "8", "--window", "16", "--tokens", "2")
    generation.run(parsed(generation, tmp_path, *words))
    printed = capsys.readouterr().out
    assert "| 64 | " in printed and "| 200 | " in printed
    assert "Memory at 200 equal to that at 64: yes" in printed
    assert (tmp_path / "results.csv").read_text().count("\n") == 3 and (tmp_path / "generation.png").exists()


def test_refuses_to_time_wrong_logits(models, monkeypatch):
    _, ours = models
    attention = ours.model.layers[0].self_attn.longvq
    monkeypatch.setattr(attention, "step", lambda q, *args, **kwargs: torch.zeros_like(q))
    with pytest.raises(RuntimeError, match="with the cache the logits are"):
        generation.check(ours, 64)


def test_wrong_arguments(tmp_path):
    with pytest.raises(SystemExit, match="at least"):
        generation.run(parsed(generation, tmp_path, "--tokens", "0"))
