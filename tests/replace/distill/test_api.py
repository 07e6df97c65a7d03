"""distill_attention: errors fall, and nothing else of the model changes."""

import copy

import pytest
import torch

from longvq_layers.replace import replace_attention, restore_attention
from longvq_layers.replace.distill.api import distill_attention
from longvq_layers.replace.slot.swapped import SwappedAttention
from tests.replace.distill.cases import QUICK, batches, replaced, run, same, snapshot
from tests.replace.models import COARSE, FAMILIES, bert, encoder, gpt2, padded, tokens


def test_an_error_says_that_nothing_learns():
    model, data = replaced(variance_correction=False)
    with pytest.raises(ValueError, match=r"nothing else learns in bidirectional attention.*pass projections=True"):
        distill_attention(model, data, **QUICK)


@pytest.mark.parametrize("family", [*FAMILIES, "encoder"])
@pytest.mark.parametrize("projections", [False, True])
def test_errors_fall_and_restore_is_exact(family, projections):
    torch.manual_seed(0)
    model = encoder() if family == "encoder" else FAMILIES[family]()
    # Random texts share nothing that could be learned, so training sees the held-out text too.
    data = batches(family, 2)
    data.append(data[0])
    expected, original = run(model, data[0]), snapshot(model)
    replace_attention(model, **COARSE, calibration=data[:2])
    options = {"end_to_end": 8} if projections else {}
    before = snapshot(model)
    report = distill_attention(model, data, **QUICK, **options, projections=projections, lr=0.02)
    points = [point.error for point in report.curve if point.phase == "layers"]
    trained = [point.train_error for point in report.curve if point.phase == "layers"]
    assert min(points[1:]) < points[0]
    assert trained[-1] < trained[1]
    assert report.steps == 12 + 8 * projections
    after = snapshot(model)
    assert after[1:] == before[1:] and all(a[1:] == b[1:] for a, b in zip(after[0], before[0], strict=True))
    others = {n: p for n, p in model.named_parameters() if not projections or "mlp" in n or "embed" in n}
    values = dict(zip(dict(model.named_parameters()), before[0], strict=False))
    assert all(torch.equal(parameter, values[name][0]) for name, parameter in others.items())
    copied = copy.deepcopy(model)
    for swapped in (model, copied):
        restore_attention(swapped)
        assert torch.equal(run(swapped, data[0]), expected)
    assert same(snapshot(model), original)


def test_training_with_one_window_is_exact_when_the_window_sees_all():
    model, data = replaced(window=61)
    report = distill_attention(model, data, steps=1)
    assert max(report.before.values()) < 1e-5  # the window sees every key, so both are equal


def test_a_second_run_starts_from_the_first_and_restores_to_the_beginning():
    torch.manual_seed(0)
    model, data = bert(), batches("bert")
    expected = run(model, data[0])
    report = replace_attention(model, **COARSE, calibration=data[:2])
    first = distill_attention(model, data, **QUICK, projections=True)
    second = distill_attention(model, data, **QUICK, projections=True)
    assert second.before == pytest.approx(first.after)  # the teacher has the original projections, not the trained ones
    third = distill_attention(model, data, **QUICK)
    assert third.before == pytest.approx(second.after)
    report.restore()
    assert torch.equal(run(model, data[0]), expected)


def test_only_the_replacement_that_owns_a_module_is_undone():
    torch.manual_seed(0)
    model, data = bert(), batches("bert")
    before = copy.deepcopy(model.state_dict())
    reports = [
        replace_attention(model, **COARSE, calibration=data[:2], filter_fn=lambda module, name, n=n: f".{n}." in name)
        for n in (0, 1)
    ]
    distill_attention(model, data, **QUICK, projections=True)
    reports[1].restore()
    changed = {
        key for key, value in model.state_dict().items() if key in before and not torch.equal(value, before[key])
    }
    assert changed and all("layer.0." in key for key in changed)
    reports[0].restore()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Around(torch.nn.Module):
    """A model that adds its residual in place and returns a dict with its input, or a loss first."""

    def __init__(self, inner, way):
        super().__init__()
        self.inner, self.way = inner, way

    def forward(self, x):
        if self.way == "dict":
            return {"ids": torch.arange(len(x)), "out": x + self.inner(x)}
        if self.way == "loss":
            y = x + self.inner(x)
            return y.square().mean(), y
        if self.way == "plain":
            return x + self.inner(x)
        y = x.clone()
        y += self.inner(y)
        return y


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("way", ["dict", "loss", "in place", "attention in place"])
def test_errors_do_not_depend_on_how_a_model_passes_its_tensors(way):
    """The errors are the same for models that pass the same tensors in different ways."""
    data = [torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    found = []
    for kind in ("plain", way):
        torch.manual_seed(0)
        model = Around(Inner(), kind).eval()
        if kind == "attention in place":
            model.inner.register_forward_hook(lambda module, args, output: output.mul_(1))
        replace_attention(model, num_codes=8, window=5, calibration=data)
        end_to_end = 0 if "in place" in way else 2  # an end-to-end phase needs a gradient through the in-place residual
        report = distill_attention(model, data, steps=2, end_to_end=end_to_end, evaluate_every=2, projections=True)
        found.append([*report.before.values(), *report.after.values()])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_training_stops_early():
    model, data = replaced()
    report = distill_attention(model, data, steps=50, evaluate_every=1, patience=2, lr=3.0)
    assert report.stopped_early == ("layers",) and report.steps < 50
    assert report.after == pytest.approx({name: error for name, error in report.after.items()})
    best = min(point.error for point in report.curve)
    assert report.curve[-3].error == best  # two evaluations without a better one follow
    mean = sum(error**2 for error in report.after.values()) / len(report.after)
    assert mean == pytest.approx(best, rel=1e-4)  # the best values stay


def test_a_failure_leaves_the_model_as_it_was():
    model, data = replaced("gpt2")
    model.train()
    before = snapshot(model)
    data[1] = torch.full_like(data[1], 5000)  # token ids beyond the vocabulary
    with pytest.raises(IndexError):
        distill_attention(model, data, **QUICK, projections=True)
    assert same(snapshot(model), before)


def test_gradients_flags_and_modes_stay():
    model, data = replaced("gpt2")
    model.train()
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.h[0].attn.c_attn.weight.grad = torch.ones_like(model.transformer.h[0].attn.c_attn.weight)
    before = snapshot(model)
    distill_attention(model, data, **QUICK, projections=True)
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(a[1] == b[1] and a[2] is b[2] for a, b in zip(after[0], before[0], strict=True))
    model(data[0])[0].square().mean().backward()  # it continues to learn, by moving averages
    assert model.transformer.h[0].attn.longvq.codebook.embedding.isfinite().all()


def test_padding_has_no_influence():
    model = bert()
    inputs = {key: value for key, value in padded("right").items() if key != "position_ids"}
    replace_attention(model, **COARSE, calibration=[inputs])
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 0, 7, inputs["input_ids"])}
    reports = [distill_attention(copy.deepcopy(model), [batch] * 2, steps=4) for batch in (inputs, other)]
    assert reports[0].after == pytest.approx(reports[1].after, rel=1e-3)


def test_moving_averages_continue_from_the_trained_codes():
    model, data = replaced()
    distill_attention(model, data, **QUICK, lr=0.05)
    slot = next(module for module in model.modules() if isinstance(module, SwappedAttention))
    trained = slot.codebook.embedding.clone()
    model.train()
    model(data[0])
    torch.testing.assert_close(slot.codebook.embedding, trained, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "steps must be an int, got float", {"steps": 2.0}),
        (ValueError, "steps must be at least 0, got -1", {"steps": -1}),
        (TypeError, "end_to_end must be an int, got bool", {"end_to_end": True}),
        (ValueError, "evaluate_every must be at least 1, got 0", {"evaluate_every": 0}),
        (TypeError, "lr must be a number, got 'fast'", {"lr": "fast"}),
        (ValueError, "lr must be more than 0 and less than inf, got 0", {"lr": 0}),
        (ValueError, "held_out must be more than 0 and less than 1, got 1", {"held_out": 1}),
        (TypeError, "projections must be a bool, got 1", {"projections": 1}),
        (TypeError, "progress must be a callable or None, got str", {"progress": "print"}),
        (
            TypeError,
            r"data must be an iterable of model inputs, got Tensor; wrap one input in a list: data=\[batch\]",
            {"data": tokens()},
        ),
        (ValueError, "data must have at least one input, got none", {"data": []}),
        (TypeError, "data must hold tensors, .*, got an input of type int", {"data": [3, 4]}),
        (ValueError, "data must have at least 2 batches, 1 of them held out, got 1", {"data": [tokens()]}),
    ],
)
def test_bad_arguments_raise_and_touch_nothing(error, message, options):
    model, data = replaced()
    before = snapshot(model)
    with pytest.raises(error, match=f"distill_attention: {message}"):
        distill_attention(model, **{"data": data, **options})
    assert same(snapshot(model), before)


def test_models_that_cannot_be_distilled():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        distill_attention("bert", [tokens()] * 2)
    with pytest.raises(ValueError, match="got a model in which nothing is replaced"):
        distill_attention(gpt2(), [tokens()] * 2)
    model, data = replaced(local_keys="quantized")
    with pytest.raises(
        NotImplementedError, match="must have local_keys='exact', got 'quantized', which has no gradient"
    ):
        distill_attention(model, data)
    model, data = replaced()
    with pytest.raises(ValueError, match=r"must be the one that was given to replace_attention, .* isn't known here"):
        distill_attention(model.encoder.layer[0], data, projections=True)
    empty = bert().train()
    replace_attention(empty, **COARSE)
    with pytest.raises(RuntimeError, match="the codebook has no codes yet"):
        distill_attention(empty.eval(), data)
