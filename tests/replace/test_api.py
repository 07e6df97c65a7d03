"""replace_attention itself: options, refusals, reports, and leaving a model exactly as it was."""

import copy

import numpy
import pytest
import torch
from torch import nn

from longvq_layers import commitment_loss
from longvq_layers.replace import replace_attention, restore_attention
from longvq_layers.replace.slot.recorder import Recorder
from tests.replace.models import FAMILIES, bert, encoder, gpt2, llama, output, tokens
from tests.tolerances import assert_close

COARSE = {"num_codes": 8, "window": 5}


def snapshot(model: nn.Module) -> list:
    """Everything a failed replacement could leave behind."""

    def state(module: nn.Module) -> list:
        inside = [sorted(module.__dict__), sorted(module._modules), sorted(module._buffers)]
        hooks = [list(module._forward_hooks), list(module._forward_pre_hooks)]
        return [id(module), type(module), module.training, id(module.__dict__.get("config")), *inside, *hooks]

    return [*(state(module) for module in model.modules()), torch.get_rng_state().tolist()]


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
    assert layer.backend in ("torch", "native")  # the one that serves, not "auto"
    assert 0 < layer.key_error < 1 and 0 < layer.output_error < 1


def test_the_report_tells_of_dropout():
    assert "attention dropout is not applied" in str(replace_attention(bert(), **COARSE, calibration=[tokens()]))
    quiet = bert(attention_probs_dropout_prob=0.0)
    assert "dropout" not in str(replace_attention(quiet, **COARSE, calibration=[tokens()]))


def test_errors_fall_with_more_codes():
    model, errors = bert(), []
    for num_codes in (4, 16, 64):
        report = replace_attention(model, num_codes=num_codes, window=0, calibration=[tokens(4, 64)])
        errors.append([(layer.key_error, layer.output_error) for layer in report.layers])
        report.restore()
    for layer in range(2):
        keys, outputs = zip(*[error[layer] for error in errors], strict=True)
        assert keys[0] > keys[1] > keys[2] and outputs[0] > outputs[1] > outputs[2]


def test_the_query_metric_beats_plain_distance():
    # Queries look along one direction only: codes that spread over the others waste themselves.
    from longvq_layers import ops
    from longvq_layers.replace.slot.swapped import SwappedAttention

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 400, 16, generator=generator).unbind(0)
    q = q * torch.tensor([4.0] + [0.1] * 15)
    exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    errors = {}
    for name, moment in (("metric", q[0].transpose(1, 2) @ q[0] / 400), ("plain", torch.eye(16).repeat(2, 1, 1))):
        slot = SwappedAttention(2, 2, 16, num_codes=16, window=0, local_keys="exact", variance_correction=False)
        slot.fit_(k[0], moment, generator=generator)
        out = slot.eval()(q, k, v, causal=True)
        errors[name] = (out - exact).norm() / exact.norm()
        dense = ops.vq_attention(
            q, k, v, slot.codebook.embedding @ slot.from_metric, codes=slot.codebook(k @ slot.to_metric), causal=True
        )
        torch.testing.assert_close(out, dense)
    assert errors["metric"] < 0.5 * errors["plain"]


def test_a_code_accounts_for_the_spread_of_its_keys():
    from longvq_layers.replace.slot.swapped import SwappedAttention

    q, k, v = torch.randn(2, 4, 200, 16), torch.randn(2, 2, 200, 16), torch.randn(2, 2, 200, 16)
    k[:, :, ::2] *= 0.1  # half of the keys are near each other; what they say differs from what the others say
    v[:, :, ::2] += 2
    exact = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True, scale=0.4)
    errors = []
    for corrected in (True, False):
        slot = SwappedAttention(4, 2, 16, num_codes=8, window=0, local_keys="exact", variance_correction=corrected)
        slot.fit_(k.transpose(0, 1).flatten(1, 2), torch.diag(torch.linspace(0.2, 2, 16)).expand(2, 16, 16))
        out = slot.eval()(q, k, v, causal=True, scale=0.4)
        # By hand, for every pair: score of the code, plus half the variance of the score over the keys of the code.
        metric_keys = slot.in_metric(k)
        codes = slot.codebook(metric_keys).repeat_interleave(2, dim=1)
        books = slot.codebook.embedding.repeat_interleave(2, dim=0)
        coded = books.gather(1, codes.transpose(0, 1).flatten(1)[..., None].expand(-1, -1, 16))
        coded = coded.unflatten(1, (2, 200)).transpose(0, 1)  # (B, H, L, D)
        error = (metric_keys.repeat_interleave(2, dim=1) - coded).square().sum(-1)
        spread = torch.zeros_like(error)
        for code in range(8):
            of_code = (codes == code).float()
            mean = (error * of_code).sum((0, 2)) / of_code.sum((0, 2)).clamp(min=1)
            mean = mean.unflatten(0, (2, 2)).mean(1).repeat_interleave(2)  # the same for both queries of a key head
            spread += of_code * mean[None, :, None]
        metric_q = q @ slot.from_metric.repeat_interleave(2, dim=0)
        scores = 0.4 * metric_q @ coded.transpose(-1, -2)
        if corrected:
            scores = scores + 0.5 * 0.4**2 / 16 * metric_q.square().sum(-1)[..., None] * spread[:, :, None, :]
        scores = scores.masked_fill(torch.ones(200, 200, dtype=torch.bool).triu(1), -torch.inf)
        expected = scores.softmax(-1) @ v.repeat_interleave(2, dim=1)
        assert_close(out, expected, "corrected" if corrected else "plain")
        errors.append((out - exact).norm() / exact.norm())
    assert errors[0] < errors[1]


def test_calibration_takes_any_kind_of_input_and_ignores_padding():
    ids, mask = tokens(), torch.ones(2, 37, dtype=torch.long)
    reports = [
        replace_attention(bert(), **COARSE, calibration=calibration)
        for calibration in ([ids], [(ids, mask)], iter([{"input_ids": ids, "attention_mask": mask}]), [[ids]])
    ]
    assert len({report.calibration_keys for report in reports}) == 1
    mask[1, 20:] = 0
    report = replace_attention(bert(), **COARSE, calibration=[(ids, mask)])
    assert report.calibration_keys == 37 + 20


def test_calibration_samples_when_there_are_many_keys(monkeypatch):
    recorder = Recorder(keys_per_head=50)
    for step in range(20):
        k = torch.full((2, 1, 10, 3), float(step))
        recorder.observe(k, k, k, k, causal=False, key_padding_mask=None, scale=None)
    assert recorder.keys.shape == (1, 50, 3) and recorder.queries == 400
    assert len(recorder.keys[0, :, 0].unique()) > 12  # from all over the data, not the first or last ones
    torch.testing.assert_close(recorder.moment / 400, torch.full((1, 3, 3), sum(i**2 for i in range(20)) / 20).double())


def test_modes_stay():
    model = gpt2()
    model.transformer.h[0].train()
    before = [module.training for module in model.modules() if "longvq" not in type(module).__name__]
    report = replace_attention(model, **COARSE, calibration=[tokens()])
    assert model.transformer.h[0].attn.longvq.training and not model.transformer.h[1].attn.longvq.training
    report.restore()
    assert [module.training for module in model.modules()] == before


def test_calibration_in_inference_mode_leaves_ordinary_tensors():
    model, x = encoder(), torch.randn(2, 31, 32)
    with torch.inference_mode():
        replace_attention(model, **COARSE, calibration=[x])
        model(x)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    model.train()
    for _ in range(2):
        model(x).square().mean().backward()
    learning = encoder().train()
    with torch.inference_mode():
        replace_attention(learning, **COARSE)
    (learning(x).square().mean() + commitment_loss(learning)).backward()


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
    assert after[:-1] == before[:-1]  # the inputs above drew random numbers
    gpt = gpt2()
    before = snapshot(gpt)
    nothing = {"input_ids": tokens(), "attention_mask": torch.zeros(2, 37, dtype=torch.long)}
    with pytest.raises(ValueError, match="no key reached"):
        replace_attention(gpt, **COARSE, calibration=[nothing])
    assert snapshot(gpt) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_is_refused_and_padding_may_be(value):
    good, bad = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    bad[1, 4] = value
    padding = torch.zeros(2, 9, dtype=torch.bool)
    model = encoder()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"calibration must give finite \w+ .* from batch 1 in layers.0.self_attn"):
        replace_attention(model, **COARSE, calibration=[good, bad])
    assert snapshot(model) == before
    padding[1, 4] = True
    module = Attention().eval()
    recorder = Recorder()
    recorder.observe(*[bad[:, None]] * 4, causal=False, key_padding_mask=padding, scale=None)
    assert recorder.moment.isfinite().all() and recorder.keys.shape[1] == 17
    module.attention.in_proj_weight.data[0] = value
    with pytest.raises(ValueError, match="calibration must give finite queries"):
        replace_attention(module, **COARSE, calibration=[good])


class Attention(nn.Module):
    """One nn.MultiheadAttention, with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x, padding=None):
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "num_codes must be an int, got float", {"num_codes": 8.0}),
        (ValueError, "num_codes must be at least 1, got 0", {"num_codes": 0}),
        (ValueError, "window must be at least 0, got -1", {"window": -1}),
        (TypeError, "window must be an int, got bool", {"window": True}),
        (ValueError, "local_keys must be one of 'exact', 'quantized', got 'precise'", {"local_keys": "precise"}),
        (ValueError, "backend must be one of .*, got 'cuda'", {"backend": "cuda"}),
        (TypeError, "filter_fn must be a callable or None, got str", {"filter_fn": "layer"}),
        (
            TypeError,
            "filter_fn must return a bool, got NoneType for 'encoder.layer.0",
            {"filter_fn": lambda module, name: None},
        ),
        (
            TypeError,
            "filter_fn must return a bool, got int for 'encoder.layer.0",
            {"filter_fn": lambda module, name: 1},
        ),
        (TypeError, "strict must be a bool, got 1", {"strict": 1}),
        (TypeError, "variance_correction must be a bool, got 'yes'", {"variance_correction": "yes"}),
        (TypeError, "unexpected keyword argument 'codes'", {"codes": 8}),
        (ValueError, "nothing to replace in BertModel:\n.*filter_fn returned False", {"filter_fn": lambda m, n: False}),
        (
            ValueError,
            "calibration must be given for a model in eval mode, got None, but encoder.layer.0.attention.self, ",
            {"calibration": None},
        ),
        (ValueError, "calibration must have at least one input, got none", {"calibration": []}),
        (ValueError, "calibration must have at least one input, got none", {"calibration": iter(())}),
        (
            TypeError,
            "calibration must be an iterable of model inputs, got Tensor; wrap one input in a list",
            {"calibration": tokens()},
        ),
        (
            TypeError,
            "calibration must be an iterable of model inputs, got dict; wrap one input in a list",
            {"calibration": {"input_ids": tokens()}},
        ),
        (TypeError, "calibration must be an iterable .*, got Tensor; wrap", {"calibration": tokens(), "dry_run": True}),
        (TypeError, "calibration must be an iterable .*, got int; wrap", {"calibration": 3, "dry_run": True}),
        (TypeError, "calibration must hold tensors, .*, got an input of type int", {"calibration": [3]}),
    ],
)
def test_bad_options_raise_and_touch_nothing(error, message, options):
    model = bert()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        replace_attention(model, **{"num_codes": 8, "calibration": [tokens()], **options})
    assert snapshot(model) == before


def test_a_backend_without_a_kernel_for_the_model_is_refused():
    model = bert().double()
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match=r"compiled kernels for torch\.float32, .*got torch\.float64"):
        replace_attention(model, num_codes=8, calibration=[tokens()], backend="native")
    assert snapshot(model) == before


def test_integers_of_other_libraries_are_integers():
    calibration = iter([tokens()])
    options = {"num_codes": numpy.int64(8), "window": torch.tensor(5), "calibration": calibration}
    assert type(replace_attention(bert(), **options, dry_run=True).layers[0].num_codes) is int
    assert replace_attention(bert(), **options).layers[0].window == 5  # the dry run didn't take the input


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


def test_a_window_as_long_as_the_training_is_refused():
    with pytest.raises(ValueError, match="trained_length must be more than window=8, got 8"):
        replace_attention(llama(), num_codes=8, window=8, trained_length=8, calibration=[tokens(2, 40)])
