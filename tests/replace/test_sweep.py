"""The sweep over every model type of transformers: every replaced model is equal, and a wrong one is found."""

import sys

import pytest
import torch
from torch import nn

from longvq_layers.benchmarks import __main__ as command
from longvq_layers.benchmarks import architectures, architectures_check, architectures_tiny
from longvq_layers.benchmarks.architectures_check import BUG, EQUAL, NOT_BUILT, REFUSED, Verdict
from tests.replace.models import bert, tokens

LEAST_EQUAL = 303  # model types of 625, in transformers 5.24 without timm and torchaudio, which some need


def test_two_types_are_told_apart(monkeypatch, capsys, tmp_path):
    out = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "architectures", "--types", "bert", "t5", "--out", str(out)])
    command.main()
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    lines = printed.splitlines()
    assert lines[2] == f"| bert | BertModel | {EQUAL} |"
    assert lines[3].startswith(f"| t5 | T5Model | {REFUSED}: additive position bias")
    assert f"2 model types: 1 {EQUAL}, 1 {REFUSED}, 0 {NOT_BUILT}, 0 {BUG}; 2 attention modules replaced" in lines[-1]


def test_an_unknown_type_is_an_error():
    with pytest.raises(ValueError, match="types: got 'bart_simpson', expected one of the"):
        list(architectures.sweep(["bart_simpson"]))


@pytest.mark.filterwarnings("ignore")
def test_all_kinds_of_layers_are_kept():
    from transformers import Gemma3TextConfig, SmolLM3Config

    small = next(iter(architectures_tiny.tiny_configs(Gemma3TextConfig)))
    assert small.layer_types == ["sliding_attention", "full_attention"] and small.sliding_window == 8
    assert (small.hidden_size, small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (32, 4, 2, 8)
    small = next(iter(architectures_tiny.tiny_configs(SmolLM3Config)))
    assert small.no_rope_layers == [1, 0] and small.num_hidden_layers == 2


class Wrong(nn.Module):
    """A model whose attention changes with how it is replaced."""

    main_input_name = "input_ids"

    def __init__(self, model: nn.Module, spoil: str) -> None:
        super().__init__()
        self.model, self.spoil, self.config = model, spoil, model.config

    def forward(self, input_ids: torch.Tensor):
        x = self.model(input_ids).last_hidden_state
        slots = [module for module in self.modules() if type(module).__name__ == "SwappedAttention"]
        if self.spoil == "replaced" and slots:
            return {"x": x + 1}
        if self.spoil == "backend" and any(slot.backend == "reference" for slot in slots):
            return {"x": x + 1}
        if self.spoil == "raises" and slots:
            raise TypeError("no such thing")
        if self.spoil == "restored" and not slots and self.was_replaced:
            return {"x": x + 1}
        self.was_replaced = bool(slots)
        return {"x": x}

    was_replaced = False


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("replaced", "differs from the original by"),
        ("backend", "differs from the definition by"),
        ("raises", "no such thing"),
        ("restored", "differs from itself once restored by"),
    ],
)
def test_what_is_wrong_is_a_bug(spoil, says):
    verdict = architectures_check.compare(Wrong(bert(), spoil), {"input_ids": tokens()})
    assert verdict.kind == BUG and says in verdict.detail
    assert architectures_check.compare(Wrong(bert(), ""), {"input_ids": tokens()}).kind == EQUAL


def test_a_model_that_takes_too_long_is_given_up(monkeypatch):
    def never(*args):
        while True:
            pass

    monkeypatch.setattr(architectures, "verdict", never)
    name, verdict = architectures._verdict("bert", 1)
    assert (name, verdict) == ("bert", Verdict(NOT_BUILT, "it takes more than 1 s"))


@pytest.mark.slow
def test_no_type_is_replaced_and_wrong():
    rows = list(architectures.sweep())
    bugs = [(row.model_type, row.verdict.detail) for row in rows if row.verdict.kind == BUG]
    assert bugs == []
    assert sum(row.verdict.kind == EQUAL for row in rows) >= LEAST_EQUAL
