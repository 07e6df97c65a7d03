"""DiagonalSSM.step caches the discretisation: it is never stale, never copied, and never blocks a gradient."""

import copy
import io
import pickle

import pytest
import torch

from longvq_layers import ops
from longvq_layers.layers import DiagonalSSM, S4DLayer
from tests.tolerances import assert_close


def make(**options):
    return DiagonalSSM(4, d_state=6, causal=True, **options)


def fresh(ssm, u, state, rate=1.0):
    """A step by the operator, without a cache."""
    log_decay, weight, skip = ssm.discrete(torch.float64 if u.dtype == torch.float64 else torch.float32, rate)
    return ops.ssm_step(u, log_decay.exp(), weight[0], state, skip=skip)[0]


def inputs(ssm, dtype=torch.float32):
    u = torch.randn(2, 4, dtype=dtype)
    return u, torch.randn(2, 4, 3, dtype=ssm.initial_state(0, dtype).dtype)


@pytest.fixture
def count(monkeypatch):
    """A function that tells how often anything was discretised so far."""
    calls = []
    plain = DiagonalSSM.discrete
    monkeypatch.setattr(DiagonalSSM, "discrete", lambda self, *args: calls.append(1) or plain(self, *args))
    return lambda: len(calls)


def optimizer_step(ssm, **options):
    optimizer = torch.optim.AdamW(ssm.parameters(), lr=0.1, **options)
    with torch.enable_grad():
        ssm(torch.randn(1, 5, 4)).square().sum().backward()
    optimizer.step()


def foreach_step_alone(ssm):
    for parameter in ssm.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(ssm.parameters(), lr=0.1, foreach=True).step()


def inference_edit(ssm):
    with torch.inference_mode():
        ssm.C.mul_(3)


def same_address_edit(ssm):
    ssm.eval()  # clears the cache; the change itself can't be noticed, see `DiagonalSSM.step`
    ssm.C.data.mul_(3)
    ssm.train()


def replace_data(ssm):
    ssm.log_dt.data = ssm.log_dt.data + 1


def replace_parameter(ssm):
    ssm.C = torch.nn.Parameter(2 * ssm.C.detach())


CHANGES = {
    "optimizer": optimizer_step,
    "fused optimizer": lambda ssm: optimizer_step(ssm, fused=True),  # leaves the version: noticed by its forward
    "optimizer alone": foreach_step_alone,
    "load_state_dict": lambda ssm: ssm.load_state_dict(make(trained=ssm.trained).state_dict()),
    "assigned": lambda ssm: ssm.load_state_dict(make(trained=ssm.trained).state_dict(), assign=True),
    "in place": lambda ssm: ssm.A_imag.detach().add_(1),
    "in place, D": lambda ssm: ssm.D.detach().add_(1),
    "numbers": lambda ssm: ssm.log_A_real.detach()[0].fill_(1.5),
    "inference": inference_edit,
    "data": replace_data,
    "data in place": same_address_edit,
    "parameter": replace_parameter,
    "reset": lambda ssm: ssm.reset_parameters(),
    "rule": lambda ssm: setattr(ssm, "discretization", "bilinear"),
    "twice and back": lambda ssm: ssm.double().float().log_dt.detach().sub_(1),
}


@pytest.mark.parametrize("trained", [("A", "dt"), (), ("A", "B", "dt")], ids=["default", "none", "all"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change, trained):
    ssm = make(trained=trained)
    u, state = inputs(ssm)
    with torch.no_grad():
        before = ssm.step(u, state)[0]
        assert torch.equal(ssm.step(u, state)[0], before)
        CHANGES[change](ssm)
        after = ssm.step(u, state)[0]
        assert torch.equal(after, fresh(ssm, u, state))
    assert not torch.allclose(after, before)


def test_a_trained_b_is_noticed():
    ssm = make(trained=("B",))
    u, state = inputs(ssm)
    with torch.no_grad():
        before = ssm.step(u, state)[0]
        ssm.B.mul_(-1)
        after = ssm.step(u, state)[0]
    assert torch.equal(after, fresh(ssm, u, state)) and not torch.allclose(after, before)


def test_steps_discretise_once(count):
    ssm = make()
    u, state = inputs(ssm)
    with torch.no_grad():
        for _ in range(5):
            ssm.step(u, state)
        assert count() == 1
        with torch.inference_mode():
            ssm.step(u, state)
        ssm.step(u.bfloat16(), state)  # the same precision of arithmetic
        assert count() == 1
        for expected, other in enumerate((0.5, 1.0, 2), start=2):  # the cache has one entry
            assert torch.equal(ssm.step(u, state, rate=other)[0], fresh(ssm, u, state, other))
            assert count() == 2 * expected - 1
    start = count()
    with torch.inference_mode():
        for _ in range(3):
            ssm.step(u, state, rate=3.0)
    assert count() == start + 1
    frozen = make(trained=()).requires_grad_(False)
    start = count()
    for _ in range(3):
        frozen.step(u, state)  # gradients are on, but no tensor requires one
    assert count() == start + 1


@pytest.mark.parametrize("start", ["forward", "initial_state", "train", "eval", "half"])
def test_a_new_sequence_clears_the_cache(start, count):
    ssm = make()
    u, state = inputs(ssm)
    with torch.no_grad():
        ssm.step(u, state)
        if start == "forward":
            ssm(u.unsqueeze(1))
        elif start == "initial_state":
            ssm.initial_state(2)
        else:
            getattr(ssm, start)()
        before = count()
        ssm.step(u, state)
    assert count() == before + 1


def test_precisions_do_not_mix():
    ssm = make()
    u, state = inputs(ssm, torch.float64)
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float64):
            now = state.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
            y, end = ssm.step(u.to(dtype), now)
            assert y.dtype == dtype and end.dtype == now.dtype
            assert torch.equal(y, fresh(ssm, u.to(dtype), now))


def test_gradients_after_steps_without():
    ssm = make(dtype=torch.float64)
    u, state = inputs(ssm, torch.float64)
    with torch.inference_mode():
        ssm.step(u, state)
    ssm.step(u, state)[0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in ssm.parameters())
    with torch.inference_mode():
        ssm.requires_grad_(False).step(u, state)
    u.requires_grad_()
    ssm.step(u, state)[0].sum().backward()  # through terms that were cached in inference mode
    assert_close(u.grad[0], (ssm.discrete(torch.float64)[1][0].sum(-1).real + ssm.D), "gradient of u")
    ssm.requires_grad_(True)
    assert ssm.step(u, state)[0].requires_grad


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_no_cache(how):
    ssm = make(trained=("dt",))
    u, state = inputs(ssm)
    with torch.no_grad():
        expected = ssm.step(u, state)[0]
        keys, size = list(ssm.state_dict()), len(pickle.dumps(ssm))
        assert size == len(pickle.dumps(make(trained=("dt",))))
        assert keys == list(make(trained=("dt",)).state_dict())
        clone = how(ssm)
        assert clone._step_cache is None and ssm._step_cache is not None
        assert torch.equal(clone.step(u, state)[0], expected)
        clone.C.mul_(2)
        assert torch.equal(clone.step(u, state)[0], fresh(clone, u, state))
        assert torch.equal(ssm.step(u, state)[0], fresh(ssm, u, state))
    torch.save(ssm, file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=False)._step_cache is None


def test_parameters_that_are_computed():
    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    ssm = make()
    u, state = inputs(ssm)
    torch.nn.utils.parametrize.register_parametrization(ssm, "C", Double())
    with torch.no_grad():
        ssm.step(u, state)
        ssm.parametrizations.C.original.mul_(3)
        assert torch.equal(ssm.step(u, state)[0], fresh(ssm, u, state))
    assert ssm.step(u, state)[0].requires_grad


def test_functional_call_and_ensembles():
    ssm, other = make(), make()
    u, state = inputs(ssm)
    parameters = dict(other.named_parameters())

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ssm = ssm

        def forward(self, u, state):
            return self.ssm.step(u, state)[0]

    def run(parameters):
        return torch.func.functional_call(Step(), {f"ssm.{k}": p for k, p in parameters.items()}, (u, state))

    with torch.no_grad():
        kept = ssm.step(u, state)[0]
        assert torch.equal(run(parameters), fresh(other, u, state))
        assert torch.equal(ssm.step(u, state)[0], kept)
        stack = {k: torch.stack([p, q]) for (k, p), q in zip(parameters.items(), ssm.parameters(), strict=True)}
        both = torch.vmap(run)(stack)
        assert_close(both, torch.stack([fresh(other, u, state), kept]), "ensemble")
        assert torch.equal(ssm.step(u, state)[0], kept)


def test_inference_and_fake_tensors_are_not_cached():
    with torch.inference_mode():
        made = make()
        u, state = inputs(made)
        made.step(u, state)
        made.C.mul_(2)
        assert torch.equal(made.step(u, state)[0], fresh(made, u, state))
    ssm = make()
    with torch.no_grad(), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        ssm.step(torch.randn(2, 4), torch.zeros(2, 4, 3, dtype=torch.complex64))
    with torch.no_grad():
        u, state = u.clone(), state.clone()
        assert type(ssm.step(u, state)[0]) is torch.Tensor


@pytest.mark.parametrize("grad", [True, False])
def test_compiled_steps_cache_nothing(grad):
    torch.compiler.reset()
    layer = S4DLayer(4, d_state=6, causal=True)
    compiled = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    x, state = torch.randn(2, 4), torch.randn(2, 4, 3, dtype=torch.complex64)
    with torch.set_grad_enabled(grad):
        layer.step(x, state)
        for factor in (1, 2):
            layer.ssm.C.detach().mul_(factor)
            layer.ssm.C.data.mul_(factor)  # an eager step would not notice it
            y, _ = compiled(x, state)
            layer.initial_state(2)
            assert_close(y, layer.step(x, state)[0], "step")


def test_a_cuda_graph_contains_the_discretisation(monkeypatch, count):
    class OnCuda(torch.nn.Parameter):
        is_cuda = True

    ssm = make()
    u, state = inputs(ssm)
    monkeypatch.setattr("longvq_layers.layers.ssm.diagonal._ORDINARY", (torch.Tensor, torch.nn.Parameter, OnCuda))
    ssm.log_dt = OnCuda(ssm.log_dt.detach())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad():
        ssm.step(u, state), ssm.step(u, state)
        assert count() == 2 and ssm._step_cache is None


def test_steps_take_the_dtype_of_the_layer():
    layer = S4DLayer(4, d_state=6, causal=True)
    x, state = torch.randn(2, 4), layer.initial_state(2)
    for wrong in (torch.float16, torch.float64):
        text = f"S4DLayer.step: x must have the dtype of the layer, torch.float32, got {wrong}"
        with pytest.raises(TypeError, match=text):
            layer.step(x.to(wrong), state)
    with pytest.raises(TypeError, match=r"x must be a real floating-point tensor, got torch.int64"):
        layer.step(x.long(), state)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor .*got list"):
        layer.step([1.0], state)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.step(x.bfloat16(), state)[0].dtype == torch.bfloat16
    y, _ = copy.deepcopy(layer).half().step(x.half(), state)
    assert y.dtype == torch.float16
