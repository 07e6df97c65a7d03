"""The benchmarks of generation and of a rotary model, at sizes that take seconds."""

import argparse
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longvq_layers.benchmarks import byte_llama, generation, llama


def arguments(module, tmp_path, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([*words, "--threads", "1", "--out", str(tmp_path)])


def test_generation(tmp_path, capsys):
    words = ("--lengths", "64", "200", "--codes", "8", "--window", "16", "--tokens", "2")
    generation.run(arguments(generation, tmp_path, *words))
    printed = capsys.readouterr().out
    assert "| 64 | " in printed and "| 200 | " in printed
    assert "Memory at 200 equal to that at 64: yes" in printed
    assert (tmp_path / "results.csv").read_text().count("\n") == 3 and (tmp_path / "generation.png").exists()


def test_generation_checks_before_it_times(monkeypatch):
    _, ours = generation._models(8, 16)
    attention = ours.model.layers[0].self_attn.longvq
    monkeypatch.setattr(attention, "step", lambda q, *args, **kwargs: torch.zeros_like(q))
    with pytest.raises(RuntimeError, match="with the cache the logits are"):
        generation.check(ours, 64)


def test_llama(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llama, "_FINE_LENGTH", 300)
    monkeypatch.setattr(llama, "_CALIBRATION", 2)
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
    llama.run(arguments(llama, tmp_path, *words))
    printed = capsys.readouterr().out
    for name in ("its own", "window 256 alone", "rotated, 512 codes, window 256", "rectified, 512 codes, window 256"):
        assert f"| {name} | " in printed
    assert printed.count("| rectified, 512 codes, window 256 |") == 4  # source and keys, before and after
    assert (tmp_path / "llama.png").exists() and (tmp_path / "m" / "config.json").exists()


def test_a_window_alone_is_the_model_with_a_window():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**byte_llama._SIZES)).eval()
    tokens = byte_llama.windows(80, 1)[:, :-1]
    with torch.no_grad():
        wide, narrow, own = (
            m(tokens).logits for m in (byte_llama.window_only(model, 80), byte_llama.window_only(model, 10), model)
        )
    assert torch.allclose(wide, own, atol=1e-4)
    assert torch.allclose(narrow[:, :10], own[:, :10], atol=1e-4) and not torch.allclose(narrow, own, atol=1e-2)


def test_keys_stand_where_they_should():
    ask = b"\nassert KEY == " + bytes([byte_llama.ASK])
    text = bytes(byte_llama.recall(400, 1, "val", 0, asked=1)[0].tolist())
    key = text[-1:]
    assert len(text) == 401 and b"\nKEY = " + key + b"\n" in text[: 400 // 8 + 20] and key[0] in byte_llama.KEYS
    assert text.endswith(ask + key) and text.count(key) == 2
    assert len({row[-1].item() for row in byte_llama.recall(300, 64, "val", 1, asked=1)}) == 16
    often = bytes(byte_llama.recall(400, 1, "val", 0, asked=3)[0].tolist())
    assert often.count(ask + key + b"\n") == 2 and often.endswith(ask + key) and often.count(key) == 4
    mixed = byte_llama.mixed(400, 0)
    assert mixed.shape == (8, 401) and (mixed == byte_llama.ASK).sum(1).tolist() == [0, 0, 0, 0, 1, 3, 6, 12]


def test_score_counts_texts_that_are_right_throughout():
    tokens = torch.tensor([[0, 1, 2, 3, 1], [0, 1, 2, 3, 3]])

    def next_number(row, use_cache, logits_to_keep):
        logits = 20.0 * torch.nn.functional.one_hot((row + 1) % 4, 4)
        return argparse.Namespace(logits=logits[:, -logits_to_keep:])

    bits, right = byte_llama.score(next_number, tokens, 1)
    assert right == 0 and bits == pytest.approx(20 / math.log(2), rel=1e-3)
    tokens[0, -1] = 0
    bits, right = byte_llama.score(next_number, tokens, 2)
    assert right == 0.5 and bits == pytest.approx(20 / 4 / math.log(2), rel=1e-3)


@pytest.mark.parametrize(
    ("module", "words"), [(generation, ("--tokens", "0")), (llama, ("--lengths", "100")), (llama, ("--texts", "0"))]
)
def test_wrong_arguments(module, words, tmp_path):
    with pytest.raises(SystemExit, match="at least"):
        module.run(arguments(module, tmp_path, *words))
