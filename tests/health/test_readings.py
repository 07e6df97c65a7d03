"""The tables of codebooks and gradients, and the row for a log, against values computed by hand."""

import math

import pytest
import torch
from torch import nn

from longvq_layers import Codebook, VQAttention
from longvq_layers.health import Monitor, codebook_statistics, gradient_scales, log_row
from longvq_layers.health._model_parts import parts
from tests.health.small import KINDS, blocks, build, name, tokens, train

# kind of block -> kind of gradient -> prefixes of its parameters' names in the block
EXPECTED = {
    "longvq": {
        "ssm": ("ssm.",),
        "codebook/keys": ("k_proj.", "attention.window_bias"),
        "attention": ("q_proj.", "v_proj.", "candidate_"),
        "gates": ("attention_gate.", "output_gate."),
        "feed-forward": ("ffn.",),
        "embedding/other": ("norm",),
    },
    "mega": {
        "ssm": ("ema.",),
        "attention": ("attention.", "gamma", "beta", "v_proj.", "h_proj."),
        "gates": ("mx_proj.",),
        "feed-forward": ("ffn.",),
        "embedding/other": ("norm",),
    },
    "spade": {
        "ssm": ("ssm.",),
        "codebook/keys": ("local.k_proj.", "local.window_bias"),
        "attention": ("local.q_proj.", "local.v_proj.", "local.out_proj."),
        "feed-forward": ("ffn.",),
        "embedding/other": ("norm", "combine"),
    },
    "s4d": {"ssm": ("mixer.",), "feed-forward": ("ffn.",), "embedding/other": ("norm",)},
    "transformer": {"attention": ("qkv_proj.", "out_proj."), "feed-forward": ("ffn.",), "embedding/other": ("norm",)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_the_kind_of_its_module(kind):
    model = build(kind, depth=2)
    prefix = name(0) + "."
    for part in parts(model):
        if part.block == name(0):
            path = part.name.removeprefix(prefix)
            expected = next((k for k, starts in EXPECTED[kind].items() if path.startswith(starts)), "embedding/other")
            assert part.kind == expected, path
    outside = {part.name for part in parts(model) if part.block is None}
    assert outside == {n for n, _ in model.named_parameters() if ".blocks." not in n}
    assert len(parts(model)) == len(list(model.parameters()))


def test_gradient_scales_by_hand():
    model = build(depth=2)
    assert all(math.isnan(row.grad_norm) and math.isnan(row.ratio) for row in gradient_scales(model))
    train(model, 1)
    row = next(row for row in gradient_scales(model) if (row.block, row.kind) == (name(1), "gates"))
    block = blocks(model)[1]
    members = [*block.attention_gate.parameters(), *block.output_gate.parameters()]
    gradient = torch.cat([p.grad.flatten() for p in members]).norm().item()
    weight = torch.cat([p.detach().flatten() for p in members]).norm().item()
    assert (row.grad_norm, row.param_norm) == pytest.approx((gradient, weight), rel=1e-5)
    assert row.ratio == pytest.approx(gradient / weight, rel=1e-5) and row.bad == ()
    assert row.rms == pytest.approx(gradient / sum(p.numel() for p in members) ** 0.5, rel=1e-5)
    for parameter in members[:2]:
        parameter.requires_grad_(False)
    members[2].grad.fill_(math.nan)
    row = next(row for row in gradient_scales(model) if (row.block, row.kind) == (name(1), "gates"))
    assert row.bad == (name(1, "output_gate.weight"),)
    table = str(gradient_scales(model)).splitlines()
    assert len(table) == 5 and all(kind in table[0] for kind in EXPECTED["longvq"])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        gradient_scales(3)


def test_statistics_are_those_of_the_codebooks():
    layer = VQAttention(16, 4, num_kv_heads=2, num_codes=8)
    layer(torch.randn(2, 50, 16))
    book: Codebook = layer.codebook
    book.idle[1, :3] = 12
    rows = codebook_statistics(layer)
    assert [row.longest_idle for row in rows] == [int(book.idle[0].max()), 1]  # none waits longer than there were calls
    assert [(row.name, row.head, row.num_codes) for row in rows] == [("attention.codebook", h, 8) for h in (0, 1)]
    assert [row.dead for row in rows] == [0, 3]
    assert [row.usage for row in rows] == pytest.approx(book.usage().tolist())
    assert [row.perplexity for row in rows] == pytest.approx(book.perplexity().tolist())
    assert [row.quantization_error for row in rows] == pytest.approx(book.quantization_error().tolist())
    share = book.ema_count / book.ema_count.sum(-1, keepdim=True)
    assert [row.top_share for row in rows] == pytest.approx(share.amax(-1).tolist())
    assert len(str(rows).splitlines()) == 4
    assert codebook_statistics(nn.Linear(2, 2)) == []


def test_a_row_has_the_same_names_at_every_call():
    model = build(depth=1)
    with Monitor(model) as monitor:
        before = log_row(model, monitor)
        train(model, 2, monitor)
        after = log_row(model, monitor)
    assert before.keys() == after.keys()
    assert all(isinstance(value, float) for value in after.values()) and not any(map(math.isnan, after.values()))
    gate = name(0, "output_gate")
    assert after[f"{gate}/mean"] == monitor.output_gates[gate].last[0]
    assert after[f"{name(0, 'attention')}/entropy"] == pytest.approx(monitor.entropy[name(0, "attention")].last[0])
    without = log_row(model)
    assert without.keys() < after.keys() and not any("entropy" in key for key in without)
    model.eval()(tokens())
    assert log_row(model) == without
