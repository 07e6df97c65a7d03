"""The options `trained` and `rate` of the SSM, and learning rates of its parameters."""

import copy
import math
import re

import pytest
import torch

from longvq_layers.layers import DiagonalSSM, S4DLayer, optimizer_groups
from tests.tolerances import BOUND, assert_close

SUBSETS = [(), ("A",), ("B",), ("dt",), ("A", "dt"), ("A", "B", "dt")]
each_subset = pytest.mark.parametrize("trained", SUBSETS, ids="-".join)
each_rule = pytest.mark.parametrize("rule", ["zoh", "bilinear"])
each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
NAMES = {"log_dt": "dt", "log_A_real": "A", "A_imag": "A", "B": "B"}


def random_b(ssm):
    if "B" in ssm.trained:
        torch.nn.init.normal_(ssm.B)
    return ssm


@each_subset
@each_direction
def test_untrained_tensors_are_buffers_and_stay(trained, causal):
    ssm = DiagonalSSM(4, d_state=6, causal=causal, trained=trained)
    learned = {name for name, kind in NAMES.items() if kind in trained}
    assert {name for name, _ in ssm.named_parameters()} == learned | {"C", "D"}
    assert {name for name, _ in ssm.named_buffers()} == {"log_dt", "log_A_real", "A_imag"} - learned
    assert set(ssm.state_dict()) == {"log_dt", "log_A_real", "A_imag", "C", "D"} | ({"B"} & learned)
    before = copy.deepcopy(ssm.state_dict())
    optimizer = torch.optim.AdamW(optimizer_groups(ssm, lr=0.1, weight_decay=0.5))
    ssm(torch.randn(2, 9, 4)).square().sum().backward()
    optimizer.step()
    for name, value in ssm.state_dict().items():
        changed = name in learned | {"C", "D"}
        assert torch.equal(value, before[name]) != changed, name
        assert (getattr(ssm, name).grad is not None) == changed, name


@each_subset
def test_checkpoints_fit_either_way(trained):
    for other in SUBSETS:
        if ("B" in other) == ("B" in trained):
            source, target = (DiagonalSSM(4, d_state=6, trained=names) for names in (trained, other))
            random_b(source)
            target.load_state_dict(source.state_dict())
            u = torch.randn(2, 9, 4)
            assert torch.equal(source(u), target(u))
            assert set(source.state_dict()) == set(target.state_dict())


def test_b_multiplies_the_input():
    plain = DiagonalSSM(4, d_state=6, dtype=torch.float64)
    ssm = DiagonalSSM(4, d_state=6, dtype=torch.float64, trained=["B", "dt"])
    ssm.load_state_dict(plain.state_dict(), strict=False)
    u = torch.randn(2, 9, 4, dtype=torch.float64)
    assert ssm.B.shape == (4, 3, 2)
    assert torch.equal(ssm(u), plain(u))  # B starts at 1
    random_b(ssm)
    product = torch.view_as_complex(plain.C.detach()) * torch.view_as_complex(ssm.B.detach())
    plain.load_state_dict({"C": torch.view_as_real(product)}, strict=False)
    assert_close(ssm(u), plain(u), "B in C")
    ssm.reset_parameters()
    assert torch.equal(ssm.B, torch.tensor([1.0, 0.0], dtype=torch.float64).expand(4, 3, 2))


def test_names_in_trained_are_checked():
    assert DiagonalSSM(2, trained={"dt", "B"}).trained == ("B", "dt")
    for wrong in ("A", "dt", None, 3, iter(["A"])):
        with pytest.raises(TypeError, match=r"trained must be a collection of names out of \('A', 'B', 'dt'\), got"):
            S4DLayer(4, trained=wrong)
    for wrong in (("A", "C"), ["log_dt"], [None]):
        with pytest.raises(ValueError, match="trained must be one of 'A', 'B', 'dt', got"):
            S4DLayer(4, trained=wrong)
    assert "trained=('A', 'B')" in S4DLayer(4, trained=["B", "A"]).extra_repr()


@each_subset
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_stay_float32_in_half_modules(trained, dtype):
    layer = S4DLayer(4, d_state=6, trained=trained)
    values = copy.deepcopy(layer.ssm.state_dict())
    for half in (copy.deepcopy(layer).to(dtype), layer.half() if dtype == torch.float16 else layer.bfloat16()):
        assert half.out_proj.weight.dtype == dtype
        for name, value in half.ssm.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, values[name]), name
    made = S4DLayer(4, d_state=6, trained=trained, dtype=dtype)
    assert {value.dtype for value in made.ssm.state_dict().values()} == {torch.float32}
    assert {value.dtype for value in made.double().ssm.state_dict().values()} == {torch.float64}


@each_rule
@pytest.mark.parametrize("trained", [(), ("A", "B", "dt")], ids=["frozen", "trained"])
@pytest.mark.parametrize("rate", [1.0, 0.37, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_prefill_then_steps_equal_the_whole(rule, trained, rate, dtype):
    layer = S4DLayer(5, d_state=8, causal=True, discretization=rule, trained=trained, dtype=dtype).eval()
    random_b(layer.ssm)
    x = torch.randn(2, 40, 5, dtype=dtype)
    with torch.no_grad():
        whole, last = layer(x, return_state=True, rate=rate)
        first, state = layer(x[:, :25], return_state=True, rate=rate)
        tokens = [first]
        for t in range(25, 40):
            y, state = layer.step(x[:, t], state, rate=rate)
            tokens.append(y.unsqueeze(1))
        assert_close(torch.cat(tokens, 1), whole, "output")
        assert_close(state, last, "state")
        slow, _ = layer(x, return_state=True)
        if rate != 1:
            assert (slow - whole).abs().max() > BOUND[dtype]


@each_rule
@each_direction
def test_gradcheck_with_b_and_rate(rule, causal):
    layer = S4DLayer(2, d_state=4, causal=causal, discretization=rule, trained=("A", "B", "dt"), dtype=torch.float64)
    random_b(layer.ssm)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x, {"rate": 1.7})

    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_holding_the_input_at_half_the_rate(dtype):
    ssm = random_b(DiagonalSSM(4, d_state=6, causal=True, dtype=dtype, trained=("B",)))
    u = torch.randn(2, 30, 4, dtype=dtype)
    held = u.repeat_interleave(2, 1)
    whole, last = ssm(u, return_state=True)
    halves, end = ssm(held, return_state=True, rate=0.5)
    assert_close(halves[:, 1::2], whole, "two half steps make one")
    weight, half_weight = ssm.discrete(dtype)[1][0], ssm.discrete(dtype, 0.5)[1][0]
    assert_close(end * half_weight, last * weight, "what the state says")
    assert_close(ssm(held[:, ::2], rate=1.0), whole, "rate 1 is the default")


@each_rule
@each_direction
def test_rate_is_a_factor_of_dt(rule, causal):
    ssm = DiagonalSSM(4, d_state=6, causal=causal, discretization=rule, dtype=torch.float64)
    u = torch.randn(2, 30, 4, dtype=torch.float64)
    y = ssm(u, rate=2.0)
    with torch.no_grad():
        ssm.log_dt.add_(math.log(2.0))
    assert_close(y, ssm(u), "rate 2")


@pytest.mark.parametrize("layer", [DiagonalSSM(4, d_state=6, causal=True), S4DLayer(4, d_state=6, causal=True)])
def test_the_rate_is_checked(layer):
    x, state = torch.randn(2, 4), layer.initial_state(2)
    for call in (lambda rate: layer(x.unsqueeze(1), rate=rate), lambda rate: layer.step(x, state, rate=rate)):
        for wrong in (0, 0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"rate must be a finite number above 0, got {re.escape(str(wrong))}"):
                call(wrong)
        for wrong in (None, "2", True, torch.tensor(2.0)):
            with pytest.raises(TypeError, match="rate must be a number, got"):
                call(wrong)


def test_each_layer_has_its_range_of_dt():
    model = torch.nn.Sequential(
        S4DLayer(500, d_state=2, dt_min=1e-4, dt_max=1e-3, trained=()),
        S4DLayer(500, d_state=2, dt_min=0.1, dt_max=1),
        S4DLayer(500, d_state=2, dt_min=0.02, dt_max=0.02),
    )
    for low, high, layer in zip((1e-4, 0.1, 0.02), (1e-3, 1, 0.02), model, strict=True):
        for _ in range(2):
            dt = layer.ssm.log_dt.detach().exp()
            assert (dt > 0.999 * low).all() and (dt < 1.001 * high).all()
            assert dt.min() < 1.1 * low and dt.max() > high / 1.1
            layer.ssm.reset_parameters()


def test_a_learning_rate_for_each_kind():
    model = torch.nn.Sequential(S4DLayer(4, d_state=4, trained=("A", "B", "dt")), S4DLayer(4, d_state=4))
    names = {id(p): name for name, p in model.named_parameters()}

    def members(**options):
        groups = optimizer_groups(model, lr=1e-2, weight_decay=0.1, **options)
        assert sum(len(g["params"]) for g in groups) == len(names)
        torch.optim.AdamW(groups)
        slow = [g for g in groups if g["name"].startswith("ssm")]
        assert all(g["weight_decay"] == 0 for g in slow)
        return {g["name"]: (g["lr"], {names[id(p)] for p in g["params"]}) for g in slow}

    poles = {"0.ssm.log_A_real", "0.ssm.A_imag", "1.ssm.log_A_real", "1.ssm.A_imag"}
    steps = {"0.ssm.log_dt", "1.ssm.log_dt"}
    assert members() == {"ssm": (1e-3, poles | steps | {"0.ssm.B"})}
    assert members(ssm_lr={"A": 1e-4, "dt": 0.5}) == {
        "ssm_A": (1e-4, poles),
        "ssm_B": (1e-3, {"0.ssm.B"}),  # the default
        "ssm_dt": (1e-2, steps),  # never above lr
    }
    assert members(ssm_lr={})["ssm_A"] == (1e-3, poles)
    model[0] = S4DLayer(4, d_state=4, trained=())
    names = {id(p): name for name, p in model.named_parameters()}
    assert set(members(ssm_lr={"B": 1e-4})) == {"ssm_A", "ssm_dt"}  # empty groups are left out
    model[1] = S4DLayer(4, d_state=4, trained=())
    names = {id(p): name for name, p in model.named_parameters()}
    assert members() == members(ssm_lr={}) == {}


def test_wrong_rates_are_named():
    layer = S4DLayer(4, d_state=4)
    for wrong, text in (
        ({"A": 1e-3, "C": 1e-3}, r"ssm_lr must have rates of 'A', 'B', 'dt' only, got \['C'\]"),
        ({"dt": -1.0}, r"ssm_lr\['dt'\] must be a finite number, at least 0, got -1\.0"),
        ({"B": math.nan}, r"ssm_lr\['B'\] must be a finite number, at least 0, got nan"),
        (math.inf, "ssm_lr must be a finite number, at least 0, got inf"),
    ):
        with pytest.raises(ValueError, match=text):
            optimizer_groups(layer, lr=1e-3, weight_decay=0, ssm_lr=wrong)


@pytest.mark.parametrize("trained", [(), ("A", "B", "dt")], ids=["frozen", "trained"])
@each_direction
def test_compiled_with_rate(trained, causal):
    torch.compiler.reset()  # the limit of recompilations counts all instances of a class
    layer = S4DLayer(4, d_state=6, causal=causal, trained=trained)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 20, 4)
    for rate in (1.0, 2.0, *(0.1 * n for n in range(1, 10))):  # more values than the limit of recompilations
        y, expected = compiled(x, rate=rate), eager(x, rate=rate)
        assert_close(y, expected, f"rate {rate}")
    y.sum().backward(), expected.sum().backward()
    for (name, one), other in zip(layer.named_parameters(), eager.parameters(), strict=True):
        assert_close(one.grad, other.grad, name)
