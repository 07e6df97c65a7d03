"""The benchmark of a rotary model beyond its training length, at sizes that take seconds."""

import argparse
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longvq_layers.benchmarks.llama import command, texts
from longvq_layers.benchmarks.llama import model as byte_llama
from tests.benchmarks.command_line import parsed


def test_tables_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_FINE_LENGTH", 300)
    monkeypatch.setattr(command, "_CALIBRATION", 2)
    words = (
        "--steps",
        "2",
        "--lengths",
        "256",
        "300",
        "--texts",
        "2",
        "--fine-tune",
        "1",
        "--model",
        str(tmp_path / "m"),
    )
    command.run(parsed(command, tmp_path, *words))
    printed = capsys.readouterr().out
    for name in ("its own", "window 256 alone", "rotated, 512 codes, window 256", "rectified, 512 codes, window 256"):
        assert f"| {name} | " in printed
    assert printed.count("| rectified, 512 codes, window 256 |") == 4  # source and keys, before and after
    assert (tmp_path / "llama.png").exists() and (tmp_path / "m" / "config.json").exists()


def test_window_only_is_the_model_with_a_window():
    torch.manual_seed(0)
    own = LlamaForCausalLM(LlamaConfig(**byte_llama.SIZES)).eval()
    tokens = texts.windows(80, 1)[:, :-1]
    with torch.no_grad():
        wide, narrow, full = (
            m(tokens).logits for m in (byte_llama.window_only(own, 80), byte_llama.window_only(own, 10), own)
        )
    assert torch.allclose(wide, full, atol=1e-4)
    assert torch.allclose(narrow[:, :10], full[:, :10], atol=1e-4) and not torch.allclose(narrow, full, atol=1e-2)


def test_positions_of_the_keys():
    ask = b"\nassert KEY == " + bytes([texts.ASK])
    text = bytes(texts.recall(400, 1, "val", 0, asked=1)[0].tolist())
    key = text[-1:]
    assert len(text) == 401 and b"\nKEY = " + key + b"\n" in text[: 400 // 8 + 20] and key[0] in texts.KEYS
    assert text.endswith(ask + key) and text.count(key) == 2
    assert len({row[-1].item() for row in texts.recall(300, 64, "val", 1, asked=1)}) == 16
    often = bytes(texts.recall(400, 1, "val", 0, asked=3)[0].tolist())
    assert often.count(ask + key + b"\n") == 2 and often.endswith(ask + key) and often.count(key) == 4
    mixed = texts.mixed(400, 0)
    assert mixed.shape == (8, 401) and (mixed == texts.ASK).sum(1).tolist() == [0, 0, 0, 0, 1, 3, 6, 12]


def test_score_counts_texts_without_an_error():
    tokens = torch.tensor([[0, 1, 2, 3, 1], [0, 1, 2, 3, 3]])

    def next_number(row, use_cache, logits_to_keep):
        logits = 20.0 * torch.nn.functional.one_hot((row + 1) % 4, 4)
        return argparse.Namespace(logits=logits[:, -logits_to_keep:])

    bits, right = byte_llama.score(next_number, tokens, 1)
    assert right == 0 and bits == pytest.approx(20 / math.log(2), rel=1e-3)
    tokens[0, -1] = 0
    bits, right = byte_llama.score(next_number, tokens, 2)
    assert right == 0.5 and bits == pytest.approx(20 / 4 / math.log(2), rel=1e-3)


@pytest.mark.parametrize("words", [("--lengths", "100"), ("--texts", "0")])
def test_wrong_arguments(words, tmp_path):
    with pytest.raises(SystemExit, match="at least"):
        command.run(parsed(command, tmp_path, *words))
