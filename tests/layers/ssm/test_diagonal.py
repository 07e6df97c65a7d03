"""The diagonal SSM and S4DLayer: the textbook formulas, states, steps and double precision."""

import math

import numpy
import pytest
import torch

from longvq_layers import _checks as check
from longvq_layers import ops
from longvq_layers.layers import DiagonalSSM, S4DLayer, optimizer_groups
from tests.tolerances import assert_close

each_init = pytest.mark.parametrize("init", ["lin", "inv", "real"])
each_rule = pytest.mark.parametrize("rule", ["zoh", "bilinear"])


def textbook_kernel(ssm, direction, length):
    """K_l = 2 Re Σ C Ā^l B̄ by the definitions, (H, L), complex128."""
    a = -ssm.log_A_real.double().exp() + 1j * ssm.A_imag.double()
    dt = ssm.log_dt.double().exp().unsqueeze(-1)
    c = torch.view_as_complex(ssm.C.double().reshape(-1, *ssm.C.shape[-3:])[direction].contiguous())
    if ssm.discretization == "zoh":
        a_bar = (dt * a).exp()
        b_bar = (a_bar - 1) / a
    else:
        a_bar = (1 + dt * a / 2) / (1 - dt * a / 2)
        b_bar = dt / (1 - dt * a / 2)
    powers = a_bar.unsqueeze(-1) ** torch.arange(length)
    return 2 * (c * b_bar).unsqueeze(-1).mul(powers).sum(1).real


@each_init
@each_rule
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_textbook(init, rule, causal):
    ssm = DiagonalSSM(5, d_state=12, causal=causal, init=init, discretization=rule, dtype=torch.float64)
    u = torch.randn(2, 40, 5, dtype=torch.float64)
    expected = ssm.D * u + ops.long_conv(u, textbook_kernel(ssm, 0, 40), backend="reference")
    if not causal:
        backward = ops.long_conv(u.flip(1), textbook_kernel(ssm, 1, 40), backend="reference")
        expected = expected + backward.flip(1)
    assert_close(ssm(u), expected, "float64")
    assert_close(ssm.float()(u.float()), expected, "float32")


def test_initial_values():
    n = torch.arange(4.0)
    lin, inv, real = (DiagonalSSM(3, d_state=8, init=init) for init in ("lin", "inv", "real"))
    for ssm, expected in (
        (lin, -0.5 + 1j * math.pi * n),
        (inv, -0.5 + 1j * 8 / math.pi * (8 / (2 * n + 1) - 1)),
        (real, -(n + 1) + 0j),
    ):
        a = -ssm.log_A_real.exp() + 1j * ssm.A_imag
        assert torch.allclose(a, expected.expand(3, 4))
    dt = DiagonalSSM(2000, d_state=2, dt_min=1e-3, dt_max=1e-1).log_dt.detach().exp()
    assert 1e-3 <= dt.min() < 1.1e-3 and 9e-2 < dt.max() <= 1e-1
    assert dt.median() == pytest.approx(1e-2, rel=0.2)  # log-uniform


def test_slow_decay_keeps_its_precision_in_float32():
    ssm = DiagonalSSM(2, d_state=8, causal=True, dt_min=1e-6, dt_max=1e-6, discretization="bilinear")
    for rule in ("zoh", "bilinear"):
        ssm.discretization = rule
        for single, double in zip(ssm.discrete(), ssm.discrete(torch.float64), strict=True):
            for part in ("real", "imag") if single.is_complex() else ("real",):
                one, other = getattr(single, part).double(), getattr(double, part)
                assert (one - other).abs().le(1e-5 * other.abs() + 1e-12).all(), (rule, part)


@each_rule
def test_extreme_parameters_stay_stable(rule):
    for log_dt, log_a, a_imag in ((50, 50, 0), (-200, -200, 0), (0, 0, 1e6), (math.log(2), 0, 0), (-90, 5, 3)):
        ssm = DiagonalSSM(2, d_state=4, causal=True, discretization=rule)
        for parameter, value in ((ssm.log_dt, log_dt), (ssm.log_A_real, log_a), (ssm.A_imag, a_imag)):
            torch.nn.init.constant_(parameter, value)
        y = ssm(torch.randn(1, 300, 2))
        y.sum().backward()
        assert y.isfinite().all(), (log_dt, log_a, a_imag)
        if log_dt > -90 or log_a > -90:
            assert ssm.log_dt.grad.isfinite().all() and ssm.log_A_real.grad.isfinite().all()


@each_rule
def test_a_pole_at_zero_gives_a_sum(rule):
    ssm = DiagonalSSM(2, d_state=2, causal=True, discretization=rule)
    torch.nn.init.constant_(ssm.log_A_real, -90)
    torch.nn.init.zeros_(ssm.A_imag)
    u = torch.randn(1, 50, 2)
    expected = 2 * ssm.C[:, 0, 0] * ssm.log_dt.exp() * u.cumsum(1) + ssm.D * u
    assert_close(ssm(u), expected, "sum")


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_and_pieces_equal_the_whole(rule, dtype):
    layer = S4DLayer(6, d_state=8, causal=True, discretization=rule, dtype=dtype).eval()
    x = torch.randn(3, 70, 6, dtype=dtype)
    whole, last = layer(x, return_state=True)
    for cut in (0, 1, 33, 70):
        first, state = layer(x[:, :cut], return_state=True)
        second, end = layer(x[:, cut:], initial_state=state, return_state=True)
        assert_close(torch.cat([first, second], 1), whole, f"cut at {cut}")
        assert_close(end, last, "state")
    state, tokens = layer.initial_state(3), []
    for t in range(70):
        y, state = layer.step(x[:, t], state)
        tokens.append(y)
    assert_close(torch.stack(tokens, 1), whole, "steps")
    assert_close(state, last, "state after steps")
    _, state = layer(x[:, :40], return_state=True)  # prefill, then step
    assert_close(layer.step(x[:, 40], state)[0], whole[:, 40], "step after prefill")


@each_rule
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(rule, causal):
    layer = S4DLayer(2, d_state=4, causal=causal, discretization=rule, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *values))


def test_a_bidirectional_layer_refuses_states():
    layer = S4DLayer(4, d_state=4)
    with pytest.raises(NotImplementedError, match=r"step: causal must be True.*depend on the future"):
        layer.step(torch.randn(2, 4), layer.initial_state(2))
    with pytest.raises(NotImplementedError, match="DiagonalSSM: causal must be True to run with a state"):
        layer(torch.randn(2, 3, 4), return_state=True)


def test_wrong_arguments_are_named():
    for options, text in (
        ({"d_state": 5}, "d_state must be even"),
        ({"init": "legs"}, "init must be one of 'lin', 'inv', 'real', got 'legs'"),
        ({"discretization": "euler"}, "discretization must be one of"),
        ({"dt_min": 0.2}, r"dt_min and dt_max must be 0 < dt_min <= dt_max, got 0\.2, 0\.1"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=text):
            S4DLayer(4, **options)
    with pytest.raises(TypeError, match="d_model must be an int, got float"):
        S4DLayer(4.0)
    layer = S4DLayer(4, d_state=4, causal=True)
    with pytest.raises(ValueError, match=r"state must have shape \(B, H, N\) = \(2, 4, 2\), got \(3, 4, 2\)"):
        layer.step(torch.randn(2, 4), layer.initial_state(3))
    with pytest.raises(ValueError, match=r"u must have shape \(B, H\) = \(2, 4\), got \(2, 5\)"):
        layer.step(torch.randn(2, 5), layer.initial_state(2))


def test_optimizer_groups():
    model = torch.nn.Sequential(S4DLayer(4, d_state=4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    model[2].weight.requires_grad_(False)
    model.append(model[0])  # shared
    groups = {g["name"]: g for g in optimizer_groups(model, lr=1e-2, weight_decay=0.1)}
    names = {id(p): name for name, p in model.named_parameters()}
    members = {key: {names[id(p)] for p in g["params"]} for key, g in groups.items()}
    assert members == {
        "ssm": {"0.ssm.log_dt", "0.ssm.log_A_real", "0.ssm.A_imag"},
        "no_decay": {"0.ssm.C", "0.ssm.D", "0.out_proj.bias", "1.weight", "1.bias", "2.bias"},
        "decay": {"0.out_proj.weight"},
    }
    rates = {key: (g["lr"], g["weight_decay"]) for key, g in groups.items()}
    assert rates == {"ssm": (1e-3, 0.0), "no_decay": (1e-2, 0.0), "decay": (1e-2, 0.1)}
    assert optimizer_groups(model, lr=1e-4, weight_decay=0)[0]["lr"] == 1e-4  # never above lr
    torch.optim.AdamW(optimizer_groups(model, lr=1e-2, weight_decay=0.1))
    with pytest.raises(ValueError, match="lr must be a finite number, at least 0, got -1"):
        optimizer_groups(model, lr=-1, weight_decay=0)


def test_arguments_of_the_wrong_type_are_named():
    for name in ("dt_min", "dt_max"):
        for wrong in ("a", None, True):
            with pytest.raises(TypeError, match=f"{name} must be a number, got {wrong!r}"):
                S4DLayer(8, **{name: wrong})
    layer, right = S4DLayer(8, d_state=4), {"lr": 1e-3, "weight_decay": 0.0}
    for name, wrong in (("lr", None), ("weight_decay", "x"), ("ssm_lr", "x"), ("ssm_lr", None), ("lr", torch.ones(2))):
        with pytest.raises(TypeError, match=f"optimizer_groups: {name} must be a number, got "):
            optimizer_groups(layer, **{**right, name: wrong})
    with pytest.raises(TypeError, match=r"ssm_lr\['dt'\] must be a number, got 'x'"):
        optimizer_groups(layer, **right, ssm_lr={"dt": "x"})


def test_numbers_of_other_libraries_are_accepted():
    number = numpy.float32(0.5)
    layer = S4DLayer(8, d_state=4, causal=True, dt_min=numpy.float32(1e-3), dt_max=number)
    assert {group["lr"] for group in optimizer_groups(layer, lr=number, weight_decay=number)} == {1e-3, 0.5}
    assert optimizer_groups(layer, lr=torch.tensor(1e-4), weight_decay=0)[0]["lr"] == torch.tensor(1e-4)
    assert layer.initial_state(numpy.int64(3)).shape == (3, 8, 2)


@pytest.mark.parametrize("layer", [DiagonalSSM(4, d_state=4, causal=True), S4DLayer(4, d_state=4, causal=True)])
def test_the_batch_of_a_state_is_checked(layer):
    assert layer.initial_state(0).shape == (0, 4, 2)
    with pytest.raises(ValueError, match="batch must be 0 or more, got -1"):
        layer.initial_state(-1)
    for wrong in (2.5, None, "2", True):
        with pytest.raises(TypeError, match=f"batch must be an int, got {type(wrong).__name__}"):
            layer.initial_state(wrong)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_ensembles_by_vmap(backend, causal):
    layers = [S4DLayer(6, d_state=4, causal=causal, backend=backend) for _ in range(3)]
    x = torch.randn(2, 9, 6)
    expected = torch.stack([layer(x) for layer in layers])
    expected.square().sum().backward()
    parameters, buffers = torch.func.stack_module_state(layers)
    y = torch.vmap(lambda *own: torch.func.functional_call(layers[0], own, (x,)))(parameters, buffers)
    assert_close(y, expected, "ensemble")
    y.square().sum().backward()
    for name, stacked in parameters.items():
        assert_close(stacked.grad, torch.stack([dict(one.named_parameters())[name].grad for one in layers]), name)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
def test_the_decay_is_checked_where_its_values_can_be_read():
    decay = torch.ones(3, 2)
    seen = []
    assert check.values_are_readable(decay) and check.values_are_readable(torch.nn.Parameter(decay))
    torch.vmap(lambda x: seen.append(check.values_are_readable(x)) or x)(decay)
    torch.jit.trace(lambda x: seen.append(check.values_are_readable(x)) or x + 0, decay, check_trace=False)
    assert seen and not any(seen)
