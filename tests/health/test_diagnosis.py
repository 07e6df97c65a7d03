"""`diagnose` finds what a test broke, and finds nothing in a model that trains well."""

import copy
import math

import pytest
import torch
from torch import nn

from longvq_layers.health import THRESHOLDS, Monitor, diagnose
from longvq_layers.layers import DiagonalSSM
from tests.health.small import KINDS, blocks, build, name, tokens, train


@pytest.fixture(scope="module")
def trained():
    """A trained LongVQ model, with gradients; to be copied."""
    torch.manual_seed(0)
    model = build()
    train(model, 3)
    return model


@pytest.fixture
def model(trained):
    copied = copy.deepcopy(trained)
    for mine, theirs in zip(copied.parameters(), trained.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    return copied


def only(model, kind, module, monitor=None, *, severity="warning", **thresholds):
    """The text of the one finding of that kind; it is about that module, and nothing else is found."""
    findings = diagnose(model, monitor, thresholds=thresholds).findings
    assert [(f.severity, f.kind, f.module) for f in findings] == [(severity, kind, module)], [*map(str, findings)]
    return str(findings[0])


def kinds(model, monitor=None, **thresholds):
    return {(finding.kind, finding.module) for finding in diagnose(model, monitor, thresholds=thresholds).findings}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_trains_is_healthy(kind):
    model = build(kind)
    with Monitor(model) as monitor:
        train(model, 120, monitor)  # more than the 110 calls after which codebooks are judged
    assert str(diagnose(model, monitor)) == "healthy"
    assert str(diagnose(model)) == "healthy"


# ---- codebooks -----------------------------------------------------------------------------------------------------


def test_dead_codes(model):
    book = blocks(model)[1].codebook
    book.steps.fill_(200)
    book.idle[:, 3:] = 15
    text = only(model, "dead_codes", name(1, "attention.codebook"))
    assert "5 of 8 codes had no key in the last 10 calls, one for 15 (revive_after=100)" in text
    assert "num_codes=4 instead of 8;" in text and "set it" not in text
    book.revive_after = None
    assert "revive_after=None: set it" in only(model, "dead_codes", name(1, "attention.codebook"))
    book.steps.fill_(100)  # none was re-seeded yet
    assert diagnose(model).findings == []
    book.steps.fill_(200)
    book.idle[:, 4] = 9
    assert only(model, "dead_codes", name(1, "attention.codebook"))  # half of them
    book.idle[:, 3] = 9
    assert diagnose(model).findings == []


def test_one_code_for_all_keys(model):
    k_proj = blocks(model)[1].k_proj
    nn.init.zeros_(k_proj.weight)
    blocks(model)[1].codebook.reset_parameters()
    for _ in range(2):
        model(tokens(8))
    text = only(model, "codebook_collapsed", name(1, "attention.codebook"), severity="error")
    assert "one of 8 codes takes" in text and "k_proj" in text
    model = build(num_codes=1)
    model(tokens())
    assert diagnose(model).findings == []  # a single code has to take them all


def test_which_head_collapsed():
    model = build(depth=1, num_heads=2)
    model(tokens())
    book = blocks(model)[0].codebook
    book.ema_count[1] = torch.tensor([92.0, 2, 1, 1, 1, 1, 1, 1])
    text = only(model, "codebook_collapsed", name(0, "attention.codebook"), severity="error")
    assert "head 1: one of 8 codes takes 92.0% of the keys" in text


def test_a_codebook_that_was_never_trained(model):
    fresh = build()
    findings = diagnose(fresh).findings
    assert [(f.kind, f.module) for f in findings] == [
        ("codebook_untrained", name(layer, "attention.codebook")) for layer in range(3)
    ]
    assert "model.train()" in findings[0].change and "unfreeze" not in findings[0].change
    fresh.eval()(tokens())  # in eval mode nothing is learned
    assert len(diagnose(fresh).findings) == 3
    blocks(model)[2].codebook.reset_parameters()
    blocks(model)[2].codebook.freeze()
    model(tokens())
    text = only(model, "codebook_untrained", name(2, "attention.codebook"), severity="error")
    assert "and it is frozen" in text and "codebook.unfreeze()" in text


def test_a_frozen_codebook_is_only_noted(model):
    blocks(model)[0].codebook.freeze()
    assert "unfreeze()" in only(model, "codebook_frozen", name(0, "attention.codebook"), severity="note")
    assert diagnose(model).healthy and str(diagnose(model)).startswith("healthy, 1 note")
    assert diagnose(model.eval()).findings == []


def test_codes_far_from_the_keys(model):
    # Keys that have moved away by more than their spread; the moving averages follow them slowly.
    book = blocks(model)[2].codebook
    book.freeze()
    assert book.quantization_error() < 0.9
    book.unfreeze()
    nn.init.constant_(blocks(model)[2].k_proj.bias, 5.0)
    model(tokens(8))
    book.steps.fill_(200)
    findings = [f for f in diagnose(model).findings if f.kind == "quantization_error"]
    assert [f.module for f in findings] == [name(2, "attention.codebook")]
    assert "codebook.initialize_(keys)" in findings[0].change and "num_codes above 8" in findings[0].change
    book.steps.fill_(50)
    assert ("quantization_error", name(2, "attention.codebook")) not in kinds(model)


def test_codes_that_are_nan(model):
    blocks(model)[1].codebook.embedding[0, 2, 1] = math.nan
    assert "1 codes are NaN" in only(model, "codebook_not_finite", name(1, "attention.codebook"), severity="error")


# ---- what a monitor sees -------------------------------------------------------------------------------------------


def test_uniform_attention(model):
    block = blocks(model)[1]
    nn.init.zeros_(block.q_proj.weight)
    nn.init.zeros_(block.q_proj.bias)
    nn.init.zeros_(block.attention.window_bias)
    with Monitor(model) as monitor:
        for _ in range(3):
            model.eval()(tokens())
        text = only(model, "entropy_high", name(1, "attention"), monitor, entropy_calls=3)
        assert diagnose(model, monitor, thresholds={"entropy_calls": 4}).findings == []
    assert "entropy 1.0000 of 1 (window=8, num_codes=8, quantization_error 0." in text
    assert "num_codes" in text and "q_proj and k_proj" in text


def test_a_closed_output_gate(model):
    gate = name(0, "output_gate")
    nn.init.constant_(blocks(model)[0].output_gate.bias, -20.0)
    text = only(model, "output_gate_closed", gate, severity="error")
    assert "its bias is -20 (median)" in text and f"bias of {gate} back to 0" in text
    with Monitor(model) as monitor:
        assert "its bias" in only(model, "output_gate_closed", gate, monitor, severity="error")  # nothing seen yet
        model.eval()(tokens())
        assert "below 0.05 for 100%" in only(model, "output_gate_closed", gate, monitor, severity="error")
        nn.init.constant_(blocks(model)[0].output_gate.bias, 20.0)
        for _ in range(200):  # until the first reading has left the average
            model(tokens(1, 2))
        assert "above 0.95 for 100" in only(model, "output_gate_open", gate, monitor)


def test_a_closed_attention_gate(model):
    gate = name(2, "attention_gate")
    nn.init.constant_(blocks(model)[2].attention_gate.bias, -20.0)
    assert "its bias" in only(model, "attention_gate_closed", gate)
    with Monitor(model) as monitor:
        model.eval()(tokens())
        text = only(model, "attention_gate_closed", gate, monitor)
    assert "|G_a| is" in text and "the SSM does all the work" in text


def test_closed_gates_of_mega():
    model = build("mega")
    width, fused = 16, name(1, "mx_proj")
    block = blocks(model)[1]
    nn.init.constant_(block.mx_proj.bias[:width], -20.0)
    assert kinds(model) == {("output_gate_closed", f"{fused}.update_gate")}
    with Monitor(model) as monitor:
        model.eval()(tokens())
        assert ("output_gate_closed", f"{fused}.update_gate") in kinds(model, monitor)
    nn.init.zeros_(block.mx_proj.bias)
    nn.init.constant_(block.mx_proj.bias[width + block.d_attn : width + block.d_attn + block.d_value], -20.0)
    assert kinds(model) == {("attention_gate_closed", f"{fused}.reset_gate")}


def test_a_commitment_loss_that_dominates():
    model = build(commitment=10.0)
    with Monitor(model) as monitor:
        train(model, 2, monitor)
    findings = [f for f in diagnose(model, monitor).findings if f.kind == "commitment_dominates"]
    assert [f.module for f in findings] == [", ".join(name(layer, "attention") for layer in range(3))]
    ratio = monitor.commitment.average
    assert ratio > 0.3 and f"is {ratio:.3g} times the task's loss" in findings[0].seen
    assert "commitment=" in findings[0].change and "instead of 10" in findings[0].change


# ---- parameters and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_exploding_gradient(kind):
    model = build(kind)
    nn.init.normal_(blocks(model)[0].ffn.down.weight, std=2e3)  # about 1e4 times the initial value
    train(model, 1)
    findings = {f.kind: f for f in reversed(diagnose(model).findings)}
    assert findings["large_weight"].module == name(0, "ffn.down.weight")
    assert findings["gradient_exploding"].module == name(0)
    assert "gradient clipping" in findings["gradient_exploding"].change


@pytest.mark.parametrize("kind", KINDS)
def test_a_vanishing_gradient(kind):
    model = build(kind)
    # A block that hardly changes its input.
    handle = blocks(model)[1].register_forward_hook(lambda block, args, out: args[0] + 1e-5 * (out - args[0]))
    train(model, 1)
    findings = diagnose(model).findings
    assert {(f.kind, f.module) for f in findings} == {("gradient_vanishing", name(1))}
    assert {f.seen.partition(":")[0] for f in findings} >= {"feed-forward", "embedding/other"}
    handle.remove()


def test_gradients_that_are_exactly_zero(model):
    for parameter in blocks(model)[0].ssm.parameters():
        parameter.grad.zero_()
    text = only(model, "gradient_vanishing", name(0))
    assert "ssm: the gradient is exactly 0" in text and "ssm_lr" in text


def test_nan_and_infinity(model):
    model.get_submodule(name(1)).k_proj.weight.data[2, 3] = math.nan
    assert "1 of 128 elements" in only(model, "not_finite", name(1, "k_proj.weight"), severity="error")
    model.get_submodule(name(1)).k_proj.weight.data[2, 3] = 0
    blocks(model)[2].v_proj.weight.grad[0, 0] = math.inf
    text = only(model, "gradient_not_finite", name(2), severity="error")
    assert f"gradient of {name(2, 'v_proj.weight')}" in text and "skip this step" in text


@pytest.mark.parametrize("kind", ["longvq", "s4d"])
def test_an_ssm_without_memory(kind):
    model = build(kind)
    model(tokens())
    path, ssm = next((n, m) for n, m in model.named_modules() if isinstance(m, DiagonalSSM))
    nn.init.constant_(ssm.log_dt, math.log(1e-6))
    text = only(model, "step_size_collapsed", path)
    assert "the step Δ of 100% of the channels is below 1.0e-05" in text and "ssm_lr" in text
    nn.init.constant_(ssm.log_dt, math.log(0.1))
    nn.init.constant_(ssm.log_A_real, math.log(40.0))  # exp(-4) is left after one position
    text = only(model, "memory_lost", path)
    assert "all poles of 100% of the channels" in text and "dt_max" in text
    nn.init.constant_(ssm.log_A_real[:, 0], math.log(0.5))  # one slow pole is a memory
    assert diagnose(model).findings == []


# ---- the diagnosis itself ------------------------------------------------------------------------------------------


def test_the_worst_comes_first(model):
    blocks(model)[0].codebook.freeze()
    nn.init.constant_(blocks(model)[1].attention_gate.bias, -20.0)
    nn.init.constant_(blocks(model)[2].output_gate.bias, -20.0)
    diagnosis = diagnose(model)
    assert [f.severity for f in diagnosis.findings] == ["error", "warning", "note"]
    assert not diagnosis.healthy
    assert str(diagnosis).startswith("1 error, 1 warning, 1 note\nerror: " + name(2, "output_gate"))
    assert str(diagnosis).count("why:") == str(diagnosis).count("change:") == 3


def test_gradients_of_the_monitor_when_the_model_has_none():
    model = build("s4d")
    monitor = Monitor(model)
    train(model, 1)
    blocks(model)[1].ffn.up.weight.grad[0, 0] = math.inf
    monitor.after_backward()
    model.zero_grad()
    only(model, "gradient_not_finite", name(1), monitor, severity="error")
    assert diagnose(model).findings == []


def test_gradients_that_were_zeroed_are_only_noted():
    model = build("s4d")
    monitor = Monitor(model)
    train(model, 1)
    monitor.after_backward()
    model.zero_grad(set_to_none=False)
    assert diagnose(model, monitor).findings == []  # its gradients are those of the last backward
    assert "all gradients are exactly 0" in only(model, "gradient_vanishing", "", severity="note")
    assert diagnose(model).healthy


def test_the_model_is_not_changed(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    diagnose(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and model.training


def test_arguments_are_checked(model):
    with pytest.raises(TypeError, match=r"diagnose: model must be a torch\.nn\.Module, got int"):
        diagnose(3)
    with pytest.raises(TypeError, match="diagnose: monitor must be a Monitor, got dict"):
        diagnose(model, {})
    with pytest.raises(ValueError, match="of the same model"):
        diagnose(model, Monitor(build()))
    with pytest.raises(ValueError, match=r"thresholds must be named codebook_calls, .*, got 'entropi'"):
        diagnose(model, thresholds={"entropi": 1})
    with pytest.raises(TypeError, match=r"thresholds\['entropy'\]"):
        diagnose(model, thresholds={"entropy": "high"})
    with pytest.raises(ValueError, match="meta"):
        diagnose(build().to("meta"))


def test_every_threshold_has_a_reason():
    assert all(threshold.reason and math.isfinite(threshold.value) for threshold in THRESHOLDS.values())
    assert diagnose(nn.Linear(2, 2)).findings == []
