"""The damped EMA: the published kernels, extreme decays, states, steps and precision."""

import copy
import math

import pytest
import torch

from longvq_layers import ops
from longvq_layers.layers import DampedEMA, optimizer_groups
from tests.tolerances import assert_close

each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def published_kernels(ema, length):
    """K_l by the paper's equations, (directions · H, L), float64."""
    p, a = ema.delta.double().sigmoid(), ema.alpha.double().sigmoid()
    powers = (1 - p * a) ** torch.arange(length)
    return (p * ema.beta.double() * powers * ema.gamma.double().unsqueeze(-1)).sum(1) / math.sqrt(ema.ndim)


@each_direction
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_equals_the_published_convolution(causal, backend):
    ema = DampedEMA(5, ndim=3, causal=causal, backend=backend, dtype=torch.float64)
    u = torch.randn(2, 40, 5, dtype=torch.float64)
    kernels = published_kernels(ema, 40).split(5)
    expected = torch.empty_like(u)
    for t in range(40):  # both kernels include lag 0
        past = sum(kernels[0][:, t - j] * u[:, j] for j in range(t + 1))
        future = 0 if causal else sum(kernels[1][:, j - t] * u[:, j] for j in range(t, 40))
        expected[:, t] = past + future + ema.omega * u[:, t]
    assert_close(ema(u), expected, "float64")
    assert_close(ema.float()(u.float()), expected, "float32")


def test_initial_values_and_shapes():
    ema = DampedEMA(2000, ndim=5)
    shapes = {name: tuple(p.shape) for name, p in ema.named_parameters()}
    assert shapes == {
        "delta": (4000, 5, 1),
        "alpha": (4000, 5, 1),
        "beta": (4000, 5, 1),
        "gamma": (4000, 5),
        "omega": (2000,),
    }
    for name, std in {"delta": 0.2, "alpha": 0.2, "gamma": 1.0, "omega": 1.0}.items():
        values = getattr(ema, name).detach()
        assert values.std().item() == pytest.approx(std, rel=0.1) and values.mean().abs() < 0.1 * std
    signs = torch.tensor([1.0, -1, 1, -1, 1]).unsqueeze(-1)
    assert (ema.beta.detach() - signs).std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("delta", [-3e38, -90.0, -20.0, 0.0, 20.0, 90.0, 3e38])
@pytest.mark.parametrize("alpha", [-3e38, -90.0, -20.0, 0.0, 20.0, 90.0, 3e38])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_every_parameter_value_is_stable_and_accurate(delta, alpha, backend):
    ema = DampedEMA(2, ndim=2, causal=True, backend=backend)
    with torch.no_grad():
        ema.delta.fill_(delta)
        ema.alpha.fill_(alpha)
    log_q = ema.discrete()[0]
    assert (log_q <= 0).all() and log_q.isfinite().all()
    p, a = (1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in (delta, alpha))
    left = 1 / (1 + math.exp(min(delta, 700))) + p / (1 + math.exp(min(alpha, 700)))  # q without cancellation
    expected = math.log1p(-p * a) if p * a < 0.5 else math.log(max(left, math.exp(-700)))
    if expected > -600:
        assert log_q.double().flatten().tolist() == pytest.approx([expected] * 4, rel=1e-5)
    u = torch.randn(1, 150, 2, requires_grad=True)
    y, state = ema(u, return_state=True)
    (y.sum() + state.sum()).backward()
    for x in (y, state, u.grad, *(parameter.grad for parameter in ema.parameters())):
        assert x.isfinite().all()


def test_states_join_pieces_and_steps():
    ema = DampedEMA(4, ndim=3, causal=True, dtype=torch.float64)
    u = torch.randn(2, 23, 4, dtype=torch.float64)
    whole, last = ema(u, return_state=True)
    first, state = ema(u[:, :9], return_state=True)
    outputs = [first]
    for t in range(9, 12):
        y, state = ema.step(u[:, t], state)
        outputs.append(y.unsqueeze(1))
    rest, state = ema(u[:, 12:], initial_state=state, return_state=True)
    assert_close(torch.cat([*outputs, rest], 1), whole, "pieces")
    assert_close(state, last, "state")
    y, _ = ema.step(u[:, 0], ema.initial_state(2, torch.float64))
    assert_close(y, whole[:, 0], "the first step")


def test_each_document_has_a_state_of_its_own():
    ema = DampedEMA(4, ndim=3, causal=True)
    u, start = torch.randn(1, 20, 4), torch.randn(3, 4, 3)
    offsets = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    y, state = ema(u, cu_seqlens=offsets, initial_state=start, return_state=True)
    for n, at in enumerate((slice(0, 7), slice(7, 7), slice(7, 20))):
        alone = ema(u[:, at], initial_state=start[n : n + 1], return_state=True)
        assert_close(y[:, at], alone[0], "y")
        assert_close(state[n : n + 1], alone[1], "state")


def test_gradients_equal_those_of_the_definition():
    ema = DampedEMA(3, ndim=2, dtype=torch.float64)
    u = torch.randn(1, 17, 3, dtype=torch.float64)
    onto = torch.randn_like(u)
    kernels = published_kernels(ema, 17).split(3)
    plain = ops.long_conv(u, kernels[0]) + ops.long_conv(u.flip(1), kernels[1]).flip(1) + u * ema.omega
    for name, a, b in zip(
        dict(ema.named_parameters()),
        torch.autograd.grad(ema(u), list(ema.parameters()), onto),
        torch.autograd.grad(plain, list(ema.parameters()), onto),
        strict=True,
    ):
        assert_close(a, b, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_keeps_the_parameters_in_float32(dtype):
    ema = DampedEMA(4, causal=True)
    half = copy.deepcopy(ema).to(dtype)
    for a, b in zip(ema.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b) and b.dtype == torch.float32
    u = torch.randn(2, 30, 4).to(dtype)
    assert_close(half(u), ema(u.float()), "output")
    y, state = half.step(u[:, 0], half.initial_state(2, dtype))
    assert y.dtype == dtype and state.dtype == torch.float32


def test_nothing_is_decayed():
    groups = optimizer_groups(DampedEMA(4), lr=1e-2, weight_decay=0.1)
    assert [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [("no_decay", 5, 1e-2, 0.0)]


def test_wrong_calls_are_named():
    both, causal = DampedEMA(4), DampedEMA(4, causal=True)
    u = torch.randn(2, 3, 4)
    with pytest.raises(NotImplementedError, match=r"DampedEMA\.step: causal must be True"):
        both.step(u[:, 0], both.initial_state(2))
    with pytest.raises(NotImplementedError, match="DampedEMA: causal must be True to run with a state"):
        both(u, return_state=True)
    with pytest.raises(ValueError, match=r"DampedEMA.step: u must have shape \(B, H\) = \(2, 4\), got \(2, 3\)"):
        causal.step(u[:, 0, :3], causal.initial_state(2))
    with pytest.raises(TypeError, match=r"DampedEMA.step: u must be a torch.Tensor \(B, H\), got int"):
        causal.step(1, causal.initial_state(2))
    with pytest.raises(ValueError, match=r"state must have shape .*\(2, 4, 16\), got \(1, 4, 16\)"):
        causal.step(u[:, 0], causal.initial_state(1))
    with pytest.raises(ValueError, match="DampedEMA: ndim must be at least 1, got 0"):
        DampedEMA(4, ndim=0)
    with pytest.raises(ValueError, match="DampedEMA: backend must be one of"):
        DampedEMA(4, backend="fast")
    for batch, error in ((-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"DampedEMA.initial_state: batch must be"):
            causal.initial_state(batch)
