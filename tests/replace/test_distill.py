"""distill_attention: errors fall, gradients are right, and nothing else of the model changes."""

import copy

import pytest
import torch
from torch import nn

from longvq_layers.replace import replace_attention, restore_attention
from longvq_layers.replace.distill.api import distill_attention
from longvq_layers.replace.slot.swapped import SwappedAttention
from tests.replace.models import FAMILIES, bert, encoder, gpt2, output, padded, tokens

COARSE = {"num_codes": 8, "window": 5}
QUICK = {"steps": 12, "evaluate_every": 4}


def batches(family: str, count: int = 5, length: int = 61) -> list:
    """Inputs for one of the tiny models."""
    if family == "encoder":
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return [torch.randn(2, length, 32, generator=generator) for generator in generators]
    return [tokens(2, length, seed) for seed in range(count)]


def replaced(family: str = "bert", **options) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model, data = encoder() if family == "encoder" else FAMILIES[family](), batches(family)
    replace_attention(model, **{**COARSE, **options}, calibration=data[:2])
    return model, data


def run(model: nn.Module, x) -> torch.Tensor:
    with torch.no_grad():
        return model(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else output(model, x)


def snapshot(model: nn.Module) -> list:
    """All values, modes, flags and gradients."""
    tensors = [*model.parameters(), *model.buffers()]
    modules = [(type(module), module.training, sorted(module._modules)) for module in model.modules()]
    hooks = [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()]
    return [[(t.detach().clone(), t.requires_grad, t.grad) for t in tensors], modules, hooks]


def same(a: list, b: list) -> bool:
    tensors = zip(a[0], b[0], strict=True)
    return a[1:] == b[1:] and all(torch.equal(x[0], y[0]) and x[1:] == y[1:] for x, y in tensors)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_codes_get_the_gradient_of_finite_differences(apart, backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    far = tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (q, k)) if apart else None
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[1, 31:] = True
    slot = SwappedAttention(4, 2, 8, num_codes=6, window=4, local_keys="exact", backend=backend, dtype=torch.float64)
    keys = (k if far is None else far[1]).transpose(0, 1).flatten(1, 2)
    slot.eval().fit_(keys, torch.eye(8, dtype=torch.float64).expand(2, 8, 8), generator=generator)
    slot.spread_gain.fill_(0.7)
    toward = torch.randn(q.shape, generator=generator, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (slot(q, k, v, padding, far=far, causal=True) * toward).sum()

    trained = [slot.codebook.embedding, slot.spread, slot.spread_gain]
    plain = loss()
    for tensor in trained:
        tensor.requires_grad_(True)
    value = loss()
    torch.testing.assert_close(value, plain)
    for tensor, gradient in zip(trained, torch.autograd.grad(value, trained), strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                tensor.add_(sign * 1e-6 * direction)
                sides.append(loss())
                tensor.sub_(sign * 1e-6 * direction)
        expected = (sides[0] - sides[1]) / 2e-6
        assert expected.abs() > 1e-6
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-7)


def test_keys_get_the_gradient_of_their_mean_in_bidirectional_attention():
    # Far from any window the output depends on keys only through the means of codes: finite differences see the same.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    options = {"num_codes": 6, "window": 0, "local_keys": "exact", "variance_correction": False, "backend": "torch"}
    slot = SwappedAttention(4, 2, 8, **options, dtype=torch.float64).eval()
    slot.fit_(k.transpose(0, 1).flatten(1, 2), torch.eye(8).double().expand(2, 8, 8), generator=generator)
    toward = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    direction = torch.randn(k.shape, generator=generator, dtype=torch.float64)
    k.requires_grad_(True)
    (gradient,) = torch.autograd.grad((slot(q, k, v) * toward).sum(), k)
    with torch.no_grad():
        sides = [(slot(q, k + sign * 1e-6 * direction, v) * toward).sum() for sign in (1, -1)]
    torch.testing.assert_close((gradient * direction).sum(), (sides[0] - sides[1]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_where_nothing_learns_it_says_so():
    model, data = replaced(variance_correction=False)
    with pytest.raises(ValueError, match=r"nothing else learns in bidirectional attention.*pass projections=True"):
        distill_attention(model, data, **QUICK)


@pytest.mark.parametrize("family", [*FAMILIES, "encoder"])
@pytest.mark.parametrize("projections", [False, True])
def test_errors_fall_and_restore_is_exact(family, projections):
    torch.manual_seed(0)
    model = encoder() if family == "encoder" else FAMILIES[family]()
    data = batches(family, 2)  # random texts have nothing in common to learn, so that of the held-out batch is known
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
    assert max(report.before.values()) < 1e-5  # the original attention is what it is compared with


def test_a_second_run_starts_from_the_first_and_restores_to_the_beginning():
    torch.manual_seed(0)
    model, data = bert(), batches("bert")
    expected = run(model, data[0])
    report = replace_attention(model, **COARSE, calibration=data[:2])
    first = distill_attention(model, data, **QUICK, projections=True)
    second = distill_attention(model, data, **QUICK, projections=True)
    assert second.before == pytest.approx(first.after)  # compared with the original projections, not the trained ones
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


def test_a_killed_run_goes_on_with_the_same_curve(tmp_path):
    options = {**QUICK, "end_to_end": 8, "projections": True, "patience": 20}
    model, data = replaced()
    whole = distill_attention(model, data, **options)
    seen = []

    def kill(point) -> None:
        seen.append(point)
        if len(seen) in (3, 6):
            raise KeyboardInterrupt

    other, _ = replaced()
    before = snapshot(other)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            distill_attention(other, data, **options, checkpoint=tmp_path / "run.pt", progress=kill)
        assert same(snapshot(other), before)
    resumed = distill_attention(other, data, **options, checkpoint=tmp_path / "run.pt")
    assert [str(point) for point in resumed.curve] == [str(point) for point in whole.curve]
    assert (resumed.before, resumed.after, resumed.steps) == (whole.before, whole.after, whole.steps)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    again = distill_attention(replaced()[0], data, **options, checkpoint=tmp_path / "run.pt")  # finished already
    assert again.after == whole.after
    with pytest.raises(ValueError, match=r"checkpoint must be of the same run, .* is of a run with another lr"):
        distill_attention(other, data, **options, lr=0.5, checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere/run.pt", None, "nowhere is none"),
        (".", None, "this is a folder"),
        ("notes.txt", b"not a checkpoint", "can't be read"),
        ("empty.pt", b"", "can't be read"),
        ("weights.pt", {"weight": torch.ones(2)}, "that distill_attention wrote, .* is not one"),
    ],
)
def test_a_checkpoint_that_cannot_be_is_refused_before_anything_runs(tmp_path, name, content, message):
    model, data = replaced()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=f"distill_attention: checkpoint must be a file .*{message}"):
        distill_attention(model, data, checkpoint=tmp_path / name)
    with pytest.raises(TypeError, match="distill_attention: checkpoint must be a path, got int"):
        distill_attention(model, data, checkpoint=3)


def test_a_checkpoint_of_another_model_or_other_data_is_refused(tmp_path):
    options = {**QUICK, "projections": True, "checkpoint": tmp_path / "run.pt"}
    model, data = replaced()
    distill_attention(model, data, **options)
    other, _ = replaced()
    with torch.no_grad():
        next(other.parameters())[3] += 0.1
    before = snapshot(other)
    with pytest.raises(ValueError, match="is of a run with another model"):
        distill_attention(other, data, **options)
    assert same(snapshot(other), before)
    fresh, _ = replaced()
    with pytest.raises(ValueError, match="is of a run with another data"):
        distill_attention(fresh, data[::-1], **options)
    restore_attention(fresh)
    replace_attention(fresh, num_codes=8, window=5, calibration=data[:1])  # other metrics
    with pytest.raises(ValueError, match="is of a run with another model"):
        distill_attention(fresh, data, **options)


@pytest.mark.parametrize("change", ["distilled", "rounding", "masks"])
def test_a_checkpoint_of_the_same_run_is_taken(change, tmp_path):
    options = {**QUICK, "projections": True, "checkpoint": tmp_path / "run.pt"}
    model, data = replaced("encoder" if change == "masks" else "bert")
    if change == "masks":  # with infinities
        mask = nn.Transformer.generate_square_subsequent_mask(61)
        data = [{"src": x, "mask": mask} for x in data]
    expected = distill_attention(model, data, **options)
    if change == "rounding":
        model, _ = replaced()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6)
    assert distill_attention(model, data, **options).before == expected.before
    if change == "masks":
        turned = [{**batch, "src": batch["src"].flip(1)} for batch in data]  # the same numbers in another order
        with pytest.raises(ValueError, match="is of a run with another data"):
            distill_attention(model, turned, **options)


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
def test_outputs_and_inputs_of_any_kind_are_compared_alike(way):
    """What the report says is the same for models that differ in how they hand their tensors on."""
    data = [torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    found = []
    for kind in ("plain", way):
        torch.manual_seed(0)
        model = Around(Inner(), kind).eval()
        if kind == "attention in place":
            model.inner.register_forward_hook(lambda module, args, output: output.mul_(1))
        replace_attention(model, num_codes=8, window=5, calibration=data)
        end_to_end = 0 if "in place" in way else 2  # through which no gradient goes
        report = distill_attention(model, data, steps=2, end_to_end=end_to_end, evaluate_every=2, projections=True)
        found.append([*report.before.values(), *report.after.values()])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_it_stops_early():
    model, data = replaced()
    report = distill_attention(model, data, steps=50, evaluate_every=1, patience=2, lr=3.0)
    assert report.stopped_early == ("layers",) and report.steps < 50
    assert report.after == pytest.approx({name: error for name, error in report.after.items()})
    best = min(point.error for point in report.curve)
    assert report.curve[-3].error == best  # and then two that weren't better
    mean = sum(error**2 for error in report.after.values()) / len(report.after)
    assert mean == pytest.approx(best, rel=1e-4)  # the best values stand


def test_a_failure_leaves_the_model_as_it_was():
    model, data = replaced("gpt2")
    model.train()
    before = snapshot(model)
    data[1] = torch.full_like(data[1], 5000)  # no such token
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
    model(data[0])[0].square().mean().backward()  # and learns on, by moving averages
    assert model.transformer.h[0].attn.longvq.codebook.embedding.isfinite().all()


def test_padding_counts_for_nothing():
    model = bert()
    inputs = {key: value for key, value in padded("right").items() if key != "position_ids"}
    replace_attention(model, **COARSE, calibration=[inputs])
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 0, 7, inputs["input_ids"])}
    reports = [distill_attention(copy.deepcopy(model), [batch] * 2, steps=4) for batch in (inputs, other)]
    assert reports[0].after == pytest.approx(reports[1].after, rel=1e-3)


def test_moving_averages_go_on_from_the_trained_codes():
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
