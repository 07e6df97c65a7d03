"""The compiled step: against the definition in float64, against the compiled scan, and wrong calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from tests.native import drawn, threads
from tests.strategies import any_layout, in_precision


@st.composite
def step_calls(draw):
    """Numbers of modes around the lanes of each instruction set, in every layout."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    family = draw(st.sampled_from([torch.complex64, torch.float32]))
    batch, channels = draw(st.integers(0, 3)), draw(st.sampled_from([1, 3, 16, 17]))
    modes = draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 100, 256])))
    decay = torch.exp(-torch.rand(channels, modes)).to(family)
    if family.is_complex:
        decay = decay * torch.exp(1j * torch.randn(channels, modes))
    along = ("expanded0", "expanded1")
    return {
        "u": any_layout(draw, torch.randn(batch, channels).to(dtype), along),
        "decay": any_layout(draw, decay, along),
        "weight": any_layout(draw, torch.randn(channels, modes, dtype=family), along),
        "state": any_layout(draw, torch.randn(batch, channels, modes, dtype=family), (*along, "expanded2")),
        "skip": any_layout(draw, torch.randn(channels), ("expanded0",)) if draw(st.booleans()) else None,
    }


@given(step_calls())
@settings(max_examples=150)
def test_equals_the_definition(call):
    actual = ops.ssm_step(**call, backend="native")
    wide = {n: None if x is None else in_precision(x, torch.float64) for n, x in call.items()}
    y, state = ops.ssm_step(**wide, backend="reference")
    sizes, _ = ops.ssm_step(**{n: None if x is None else x.abs() for n, x in wide.items()}, backend="reference")
    assert actual[0].dtype == call["u"].dtype and actual[1].dtype == call["state"].dtype
    assert actual[0].shape == y.shape and actual[1].shape == state.shape
    assert ((actual[1] - state).abs() <= 4e-7 * (1 + state.abs())).all()
    # One rounding of the result, half a unit in the last place, and the roundings of a sum in float32.
    error = (actual[0].double() - y).abs() - y.abs() * torch.finfo(actual[0].dtype).eps / 2
    assert (error <= 5e-7 * sizes + (6e-8 if actual[0].dtype == torch.float16 else 0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modes", [1, 5, 32])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_steps_equal_the_scan(dtype, modes, complex_modes):
    u, log_decay, weight, skip, state = drawn(3, 80, 17, modes, complex_modes, dtype).arguments.values()
    scanned, last = ops.ssm_scan(
        u, log_decay, weight, skip=skip, initial_state=state, return_state=True, backend="native"
    )
    decay, buffer = log_decay.exp(), state.new_zeros(3, 18, modes + 1)
    buffer[:, 1:, 1:] = state
    state = buffer[:, 1:, 1:]  # a view into a larger buffer, as in a model
    outputs = []
    for t in range(80):
        before = state.clone()
        y, new = ops.ssm_step(u[:, t], decay, weight, state, skip=skip, backend="native")
        assert torch.equal(state, before), "the state was modified"
        state.copy_(new)
        outputs.append(y)
    assert ((state - last).abs() <= 1e-5 * (1 + last.abs())).all()
    error, size = (torch.stack(outputs, 1).float() - scanned.float()).abs(), scanned.float().abs()
    bound = 1e-5 * size.max() + (torch.finfo(dtype).eps * size if dtype == torch.bfloat16 else 0)
    assert (error <= bound).all()


@pytest.mark.parametrize("complex_modes", [False, True])
def test_threads_change_nothing(complex_modes):
    u, log_decay, weight, skip, state = drawn(40, 1, 130, 33, complex_modes).arguments.values()
    results = []
    for count in (1, 2, 3, 8):
        with threads(count):
            results.append(ops.ssm_step(u[:, 0], log_decay.exp(), weight, state, skip=skip, backend="native"))
    for y, new in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(new, results[0][1])


def test_gradients_equal_those_of_the_definition():
    u, log_decay, weight, skip, state = drawn(3, 1, 5, 7).arguments.values()
    pairs = []
    for dtype, backend in ((torch.float32, "native"), (torch.float64, "reference")):
        leaves = [in_precision(x, dtype).requires_grad_() for x in (u[:, 0], log_decay.exp(), weight, state, skip)]
        y, new = ops.ssm_step(*leaves[:4], skip=leaves[4], backend=backend)
        loss = y.square().sum() + (new * new.conj()).real.sum()
        pairs.append(torch.autograd.grad(loss, leaves))
    for actual, expected in zip(*pairs, strict=True):
        assert (actual - expected).abs().max() <= 2e-6 * (1 + expected.abs().max())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_a_number_that_is_not_finite_stays_in_its_channel(bad, complex_modes):
    u, log_decay, weight, skip, state = drawn(2, 1, 5, 19, complex_modes).arguments.values()
    u, decay = u[:, 0], log_decay.exp()
    clean = ops.ssm_step(u, decay, weight, state, skip=skip, backend="native")
    u[1, 2] = state[0, 3, 18] = bad
    for actual, expected in zip(ops.ssm_step(u, decay, weight, state, skip=skip, backend="native"), clean, strict=True):
        for row, channel in ((1, 2), (0, 3)):
            assert not actual[row, channel].isfinite().all()
            actual[row, channel] = expected[row, channel]
        assert torch.equal(actual, expected)


U, MODES, STATE, SKIP = torch.zeros(2, 3), torch.zeros(3, 4), torch.zeros(2, 3, 4), torch.zeros(3)
GOOD = {"u": U, "decay": MODES, "weight": MODES, "skip": SKIP, "state": STATE}
BAD = {
    "double u": {"u": U.double()},
    "integer u": {"u": U.int()},
    "rank of u": {"u": U[None]},
    "channels": {"u": torch.zeros(2, 4)},
    "double modes": {"decay": MODES.double(), "weight": MODES.double(), "state": STATE.double()},
    "complex128 modes": {"decay": MODES.cdouble(), "weight": MODES.cdouble(), "state": STATE.cdouble()},
    "no modes": {"decay": MODES[:, :0], "weight": MODES[:, :0], "state": STATE[..., :0]},
    "rank of decay": {"decay": MODES[0]},
    "rank of weight": {"weight": MODES[None]},
    "fewer weights": {"weight": MODES[:, :3]},
    "weight for fewer channels": {"weight": MODES[:2]},
    "weight of another family": {"weight": MODES.cfloat()},
    "short skip": {"skip": SKIP[:2]},
    "double skip": {"skip": SKIP.double()},
    "state of fewer rows": {"state": STATE[:1]},
    "state of fewer modes": {"state": STATE[..., :3]},
    "rank of the state": {"state": STATE[0]},
    "state of another family": {"state": STATE.cfloat()},
}


@pytest.mark.parametrize("name", BAD)
def test_the_kernel_itself_refuses_what_would_read_out_of_bounds(name):
    torch.ops.longvq.ssm_step(*GOOD.values())
    with pytest.raises(RuntimeError, match="ssm_step: "):
        torch.ops.longvq.ssm_step(*{**GOOD, **BAD[name]}.values())
