"""replace_attention and restore_attention: reports, dry runs, and models that stay exactly as they were."""

import copy

import pytest
import torch
from torch import nn

from longvq_layers.replace import replace_attention, restore_attention
from tests.replace.models import COARSE, FAMILIES, bert, encoder, gpt2, llama, output, snapshot, tokens


@pytest.mark.parametrize("family", [*FAMILIES, "encoder"])
@pytest.mark.parametrize("way", ["report", "function", "container"])
def test_restore_puts_back_the_same_objects(family, way):
    model = encoder() if family == "encoder" else FAMILIES[family]()
    x = torch.randn(2, 31, 32) if family == "encoder" else tokens()
    model.requires_grad_(False)
    run = model if family == "encoder" else (lambda x: output(model, x))
    expected, before = run(x), snapshot(model)
    report = replace_attention(model, **COARSE, calibration=[x])
    assert (run(x) - expected).abs().max() > 1e-3
    if way == "report":
        report.restore()
    elif way == "function":
        restore_attention(model)
    else:
        restore_attention(nn.ModuleList([model]))
    assert snapshot(model) == before
    assert torch.equal(run(x), expected)
    with pytest.raises(ValueError, match="nothing is replaced"):
        restore_attention(model)
    again = replace_attention(model, **COARSE, calibration=[x])  # and it can be replaced again
    swapped = run(x)
    with pytest.raises(ValueError, match="got one that was restored already"):
        report.restore()
    assert torch.equal(run(x), swapped)
    again.restore()
    assert snapshot(model) == before


@pytest.mark.parametrize("family", [*FAMILIES, "encoder"])
@pytest.mark.parametrize("first", [0, 1, None])
def test_parts_are_replaced_and_restored_one_by_one(family, first):
    model = encoder() if family == "encoder" else FAMILIES[family]()
    x = torch.randn(2, 31, 32) if family == "encoder" else tokens()
    model.requires_grad_(False)
    run = model if family == "encoder" else (lambda x: output(model, x))
    expected, before = run(x), snapshot(model)
    reports, states = [], []
    for layer, codes in ((0, 8), (1, 4)):
        chosen = {"filter_fn": lambda module, name, layer=layer: f".{layer}." in f".{name}."}
        reports.append(replace_attention(model, num_codes=codes, window=5, calibration=[x], **chosen))
        states.append(run(x))
        with pytest.raises(ValueError, match="already replaced"):
            replace_attention(model, **COARSE, calibration=[x], **chosen)
    assert [[layer.num_codes for layer in report.replaced] for report in reports] == [[8], [4]]
    assert (states[1] - states[0]).abs().max() > 1e-3
    assert ("dense L x L masks" in str(reports[1])) == (family != "encoder")
    if first is None:
        restore_attention(copy.deepcopy(model))
        assert torch.equal(run(x), states[1])
        restore_attention(model)
    else:
        reports[first].restore()
        assert (run(x) - expected).abs().max() > 1e-3
        if first == 1:
            assert torch.equal(run(x), states[0])
        reports[1 - first].restore()
    assert torch.equal(run(x), expected)
    after = snapshot(model)
    assert after[:-1] == before[:-1]


def test_dry_run_leaves_the_model_alone():
    model = bert()
    before = snapshot(model)
    report = replace_attention(model, **COARSE, dry_run=True)
    assert snapshot(model) == before
    assert "would replace 2 of 2" in str(report) and "needs calibration=" in str(report)
    assert [layer.new_kind for layer in report.layers] == ["BertSelfAttention[longvq]"] * 2
    with pytest.raises(ValueError, match="dry run"):
        report.restore()


def test_the_report_is_a_table():
    report = replace_attention(llama(), **COARSE, calibration=[tokens()], filter_fn=lambda module, name: ".1." in name)
    text = str(report)
    lines = text.splitlines()
    assert lines[0].startswith("replaced 1 of 2 attention modules, codebooks fitted to 74 keys per head")
    for word in ("module", "was", "is", "causal", "codes", "window", "local keys", "backend", "key err", "out err"):
        assert word in lines[1]
    assert len({len(line) for line in lines[1:3]}) == 1
    assert "(skipped)" in lines[3] and "LlamaAttention[longvq]" in lines[4]
    assert "skipped model.layers.0.self_attn: filter_fn returned False" in text
    assert "rotary positions: outside the window the relative position is clamped" in text
    layer = report.replaced[0]
    assert (layer.num_codes, layer.window, layer.local_keys, layer.causal) == (8, 5, "exact", "yes")
    assert layer.backend in ("torch", "native")  # the backend that serves, not "auto"
    assert 0 < layer.key_error < 1 and 0 < layer.output_error < 1


def test_the_report_tells_of_dropout():
    assert "attention dropout is not applied" in str(replace_attention(bert(), **COARSE, calibration=[tokens()]))
    quiet = bert(attention_probs_dropout_prob=0.0)
    assert "dropout" not in str(replace_attention(quiet, **COARSE, calibration=[tokens()]))


def test_modes_stay():
    model = gpt2()
    model.transformer.h[0].train()
    before = [module.training for module in model.modules() if "longvq" not in type(module).__name__]
    report = replace_attention(model, **COARSE, calibration=[tokens()])
    assert model.transformer.h[0].attn.longvq.training and not model.transformer.h[1].attn.longvq.training
    report.restore()
    assert [module.training for module in model.modules()] == before


class Broken(nn.Module):
    """Fails in the second of two calibration inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.calls = encoder(), 0

    def forward(self, x):
        self.calls += 1
        if x.shape[1] == 13:
            raise RuntimeError("no luck")
        return self.encoder(x)


def test_a_failure_on_the_way_leaves_the_model_as_it_was():
    model = Broken().train()
    model.encoder.layers[0].eval()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no luck"):
        replace_attention(model, **COARSE, calibration=[torch.randn(2, 9, 32), torch.randn(2, 13, 32)])
    after = snapshot(model)
    assert after[:-1] == before[:-1]  # without the state of the generator: the inputs above drew random numbers
    gpt = gpt2()
    before = snapshot(gpt)
    nothing = {"input_ids": tokens(), "attention_mask": torch.zeros(2, 37, dtype=torch.long)}
    with pytest.raises(ValueError, match="no key reached"):
        replace_attention(gpt, **COARSE, calibration=[nothing])
    assert snapshot(gpt) == before


def test_models_that_have_nothing_or_are_replaced():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        replace_attention("bert")
    with pytest.raises(TypeError, match=r"restore_attention: model must be a torch\.nn\.Module, got NoneType"):
        restore_attention(None)
    with pytest.raises(ValueError, match="nothing to replace in Linear"):
        replace_attention(nn.Linear(3, 3))
    for model, x in ((bert(), tokens()), (encoder(), torch.randn(2, 9, 32))):
        replace_attention(model, **COARSE, calibration=[x])
        swapped = copy.deepcopy(model)
        for again in (model, swapped, nn.ModuleList([model]), next(iter(model.children()))):
            if again is next(iter(model.children())) and isinstance(model, type(bert())):
                continue  # its first child holds the embeddings
            with pytest.raises(ValueError, match="already replaced"):
                replace_attention(again, **COARSE, calibration=[x])


def test_a_model_that_never_learned_says_so():
    model = bert().train()
    replace_attention(model, **COARSE)
    with pytest.raises(RuntimeError, match="the codebook has no codes yet"):
        output(model.eval(), tokens())
