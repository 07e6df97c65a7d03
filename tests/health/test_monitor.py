"""A monitor does not change the model, records its readings, and can be removed without a trace."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longvq_layers import commitment_loss
from longvq_layers.health import Monitor
from longvq_layers.train.evaluation import loss_of
from tests.health.small import KINDS, TASK, blocks, build, name, tokens, train


def mask(batch=2, length=20):
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, 15:] = padding[1, :4] = True
    return padding


@pytest.mark.parametrize("kind", KINDS)
def test_a_monitored_model_is_bit_identical(kind):
    results = []
    for monitored in (False, True):
        torch.manual_seed(0)
        model = build(kind, dropout=0.1)
        monitor = Monitor(model) if monitored else None
        keys = list(model.state_dict())
        train(model, 3, monitor)
        out = model(tokens(), mask())
        tensors = [out, *(p.grad for p in model.parameters()), *model.state_dict().values(), torch.get_rng_state()]
        results.append((keys, tensors))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    readings = {**monitor.entropy, **monitor.output_gates, **monitor.attention_gates}
    assert bool(readings) == (kind in ("longvq", "mega"))
    assert all(reading.calls == 4 for reading in readings.values())


# ---- what is read --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_gates_of_a_longvq_block():
    """From the block's equations, for the unmasked positions."""
    model = build(depth=1).eval()
    block, padding, words = blocks(model)[0], mask(), tokens()
    nn.init.normal_(block.output_gate.bias, std=4.0)
    nn.init.normal_(block.attention_gate.bias, std=4.0)
    for given in (None, padding):
        with Monitor(model) as monitor:
            model(words, given)
        x = model.encoder.embedding(words)
        x = x if given is None else x.masked_fill(given.unsqueeze(-1), 0)
        z = nn.functional.silu(block.ssm(block.norm1(x), given))
        keep = torch.ones_like(padding) if given is None else ~given
        wide = (z @ block.output_gate.weight.T + block.output_gate.bias)[keep]
        expected = [
            wide.sigmoid().mean(),
            (wide.sigmoid() < 0.05).float().mean(),
            (wide.sigmoid() > 0.95).float().mean(),
        ]
        assert monitor.output_gates[name(0, "output_gate")].last == pytest.approx(
            [float(e) for e in expected], rel=1e-5
        )
        wide = (z @ block.attention_gate.weight.T + block.attention_gate.bias)[keep]
        expected = [nn.functional.silu(wide).abs().mean(), (wide < -5).float().mean()]
        reading = monitor.attention_gates[name(0, "attention_gate")]
        assert reading.last == pytest.approx([float(e) for e in expected], rel=1e-5)
        assert 0 < reading.last[1] < 1


@torch.no_grad()
def test_the_gates_of_a_mega_block():
    """The weights of update and reset gate, one by one, against the block's own projection."""
    model = build("mega", depth=1).eval()
    block, padding, words = blocks(model)[0], mask(), tokens()
    nn.init.normal_(block.mx_proj.bias, std=4.0)
    with Monitor(model) as monitor:
        model(words, padding)
    x = model.encoder.embedding(words).masked_fill(padding.unsqueeze(-1), 0)
    normed = block.norm1(x)
    *_, (update, reset, _) = block._project(normed, block.ema(normed, padding))
    keep = ~padding
    expected = [update[keep].mean(), (update[keep] < 0.05).float().mean(), (update[keep] > 0.95).float().mean()]
    reading = monitor.output_gates[name(0, "mx_proj.update_gate")]
    assert reading.last == pytest.approx([float(e) for e in expected], rel=1e-5)
    reading = monitor.attention_gates[name(0, "mx_proj.reset_gate")]
    assert reading.last[0] == pytest.approx(float(reset[keep].abs().mean()), rel=1e-5)
    assert 0 < reading.last[1] < 1


def test_gates_of_a_batch_of_padding():
    model = build()
    with Monitor(model) as monitor:
        model(tokens(), torch.ones(2, 20, dtype=torch.bool))
        for reading in (*monitor.entropy.values(), *monitor.output_gates.values()):
            assert reading.calls == 1 and all(map(math.isnan, reading.last)) and math.isnan(reading.average)
        model(tokens())
        model(tokens(), torch.ones(2, 20, dtype=torch.bool))
        for reading in (*monitor.entropy.values(), *monitor.output_gates.values()):
            assert math.isnan(reading.last[0]) and 0 < reading.average <= 1  # NaN leaves the average as it was


def test_the_moving_average():
    model = build(depth=1)
    gate = blocks(model)[0].output_gate
    nn.init.zeros_(gate.weight)
    values = [0.1, 0.5, 0.9, 0.3]
    with Monitor(model) as monitor:
        for value in values:
            nn.init.constant_(gate.bias, math.log(value / (1 - value)))
            model(tokens())
    reading = monitor.output_gates[name(0, "output_gate")]
    assert (reading.last[0] == pytest.approx(0.3) and reading.average == reading.mean[0]) or reading.calls == 4
    assert reading.mean[0] == pytest.approx(sum(values) / 4)  # the plain mean of the first 20 readings


def test_the_commitment_ratio():
    model = build()
    with Monitor(model) as monitor:
        assert math.isnan(monitor.commitment.average)
        batch = TASK.batch("train", 0, 4)
        loss = loss_of(model(batch.inputs), batch.targets)
        (loss + commitment_loss(model)).backward()
        monitor.after_backward(loss)
        expected = (commitment_loss(model) / loss).item()
        assert monitor.commitment.last == pytest.approx([expected]) and expected > 0
        monitor.after_backward()
        assert monitor.commitment.calls == 1
        monitor.after_backward(0.0)
        assert monitor.commitment.last == (math.inf,)
        with pytest.raises(ValueError, match="task_loss must have one element"):
            monitor.after_backward(torch.ones(2))
        with pytest.raises(TypeError, match="task_loss"):
            monitor.after_backward("1")


def test_packed_documents_and_steps():
    model = build().eval()
    with Monitor(model) as monitor, torch.no_grad():
        model.encoder(tokens(1, 20), cu_seqlens=torch.tensor([0, 9, 20], dtype=torch.int32))
        assert all(reading.calls == 1 for reading in monitor.entropy.values())
        model.step(tokens(2, 5), model.initial_state(2))  # a step has gates, but no attention rows
        assert all(reading.calls == 1 for reading in monitor.entropy.values())
        assert all(0 < reading.average < 1 for reading in monitor.output_gates.values())


# ---- when it is read -----------------------------------------------------------------------------------------------


def test_every_third_call_is_recorded():
    model = build()
    monitor = Monitor(model, every=3)
    train(model, 7, monitor)
    readings = (*monitor.entropy.values(), *monitor.output_gates.values(), monitor.commitment)
    assert [reading.calls for reading in readings] == [3] * 7  # calls 1, 4 and 7


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_recorded_once(reentrant):
    model = build(gradient_checkpointing=True)

    def run(block, x, key_padding_mask):
        return checkpoint(block, x, key_padding_mask, use_reentrant=reentrant)

    model.encoder.backbone._gradient_checkpointing_func = run
    with Monitor(model) as monitor:
        train(model, 2, monitor)
    readings = (*monitor.entropy.values(), *monitor.output_gates.values(), *monitor.attention_gates.values())
    assert [reading.calls for reading in readings] == [2] * 9
    assert all(math.isfinite(row.grad_norm) for row in monitor.gradients)


@pytest.mark.parametrize("kind", ["longvq", "mega"])
def test_autocast(kind):
    model = build(kind, depth=1).eval()
    words = tokens()
    readings = []
    for enabled in (False, True):
        with Monitor(model) as monitor, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(words)
        values = [*monitor.entropy.values(), *monitor.output_gates.values(), *monitor.attention_gates.values()]
        readings.append([reading.mean[0] for reading in values])
    assert readings[1] == pytest.approx(readings[0], rel=0.02) and readings[1] != readings[0]


def test_half_precision():
    model = build(depth=1).to(torch.bfloat16)
    with Monitor(model) as monitor:
        model(tokens())
    assert all(0 < reading.average <= 1 for reading in (*monitor.entropy.values(), *monitor.output_gates.values()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_runs_and_is_not_recorded(backend):
    model = build(depth=1).eval()
    words = tokens()
    expected = model(words)
    with Monitor(model) as monitor:
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(model, backend=backend)(words), expected, atol=1e-6)
        assert all(reading.calls == 0 for reading in monitor.output_gates.values())
        model(words)
        assert all(reading.calls == 1 for reading in monitor.output_gates.values())


def test_functional_transforms():
    model = build("mega", depth=1, backend="reference").eval()
    with Monitor(model) as monitor:
        torch.func.grad(lambda x: model.encoder.backbone(x).square().sum())(torch.randn(1, 5, 16))
        assert all(reading.calls == 0 for reading in monitor.output_gates.values())


# ---- letting go ----------------------------------------------------------------------------------------------------


def test_remove_and_the_context_manager():
    model = build()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with Monitor(model) as monitor:
        model(tokens())
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) > hooks
    monitor.remove()  # a second call does nothing
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    model(tokens())
    assert all(reading.calls == 1 for reading in monitor.entropy.values())  # the readings stay
    with pytest.raises(RuntimeError, match="on purpose"), Monitor(model):
        raise RuntimeError("on purpose")
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_monitored(copier):
    model = build().eval()
    words = tokens()
    with Monitor(model) as monitor:
        model(words)
        other = copier(model)
        assert torch.equal(other(words), model(words))
        other(words)
        assert all(reading.calls == 2 for reading in (*monitor.entropy.values(), *monitor.output_gates.values()))
        copier(other)  # and can be copied again


def test_a_forgotten_monitor_records_nothing():
    model = build()
    monitor = weakref.ref(Monitor(model))
    gc.collect()
    assert monitor() is None
    model(tokens())


@pytest.mark.parametrize("kind", ["longvq", "mega"])
def test_tensors_of_a_forward_are_freed(kind, monkeypatch):
    model = build(kind, depth=1)
    padding, alive = mask(), []
    watched = weakref.ref(padding)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    with Monitor(model):
        out = model(tokens(), padding)
        del out, padding
        gc.collect()
        if kind == "longvq":
            model.encoder.backbone.blocks[0].attention.last_commitment = None  # keeps a graph, monitored or not
            gc.collect()
        assert watched() is None
        assert alive and all(reference() is None for reference in alive)


def test_only_parts_that_the_model_has_are_recorded():
    with Monitor(build("transformer")) as monitor:
        monitor.model(tokens())
        assert monitor.entropy == monitor.output_gates == monitor.attention_gates == {}
        assert monitor.gradients is None
    with Monitor(build(num_codes=None)) as monitor:
        monitor.model(tokens())
        assert all(0 < reading.average <= 1 for reading in monitor.entropy.values())
        assert len(monitor.entropy) == len(monitor.output_gates) == 3
    for arguments, error in (((3,), TypeError), ((build(), 0), ValueError)):
        with pytest.raises(error, match="Monitor"):
            Monitor(arguments[0], **({"every": arguments[1]} if arguments[1:] else {}))
