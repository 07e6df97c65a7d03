"""The values of the compiled scan, forward and backward, against the float64 recurrence."""

import cmath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longvq_layers import ops
from tests.native import assert_as_good_as_plain_float32, by_channel, drawn, in_absolute_values, run, threads
from tests.strategies import NativeScanCase, native_scan_cases


@given(native_scan_cases())
@settings(max_examples=150)
def test_as_accurate_as_the_recurrence_with_gradients(case):
    assert_as_good_as_plain_float32(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(data=st.data())
@settings(max_examples=40)
def test_half_types_are_computed_in_float32_and_rounded_once(dtype, data):
    assert_as_good_as_plain_float32(data.draw(native_scan_cases(dtype)))


# A segment has 12 chunks with AVX-512, else 18, in tiles of 4 or 6: lengths around their ends, for chunks of 32 and 64
# steps.
ENDS = [128, 192, 256, 384, 576, 768, 1152]


@pytest.mark.parametrize("length", [end + more for end in ENDS for more in (-1, 0, 1)] + [1100])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_at_the_ends_of_segments(length, complex_modes):
    """The oracle is the PyTorch backend in double precision, which test_scan.py compares with the recurrence."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[length % 3]
    case = drawn(2, length, 3, 3, complex_modes, dtype, reverse=length % 2 == 0)
    assert_as_good_as_plain_float32(case, oracle="torch")


@pytest.mark.parametrize("channels", [1, 16, 33])
@pytest.mark.parametrize("modes", [6, 100, 256])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_many_modes(channels, modes, complex_modes):
    assert_as_good_as_plain_float32(drawn(1, 70, channels, modes, complex_modes), oracle="torch")


@pytest.mark.parametrize("complex_modes", [False, True])
def test_many_rows(complex_modes):
    """More rows than blocks of rows, so that a block has several rows and the last block fewer."""
    assert_as_good_as_plain_float32(drawn(71, 40, 17, 2, complex_modes), oracle="torch")


@pytest.mark.parametrize("reverse", [False, True])
def test_all_masked(reverse):
    case = drawn(2, 45, 3, 2, reverse=reverse)
    case.options["key_padding_mask"][:] = True
    assert_as_good_as_plain_float32(case)
    assert run(case.leaves(), "native", case)["y"].eq(0).all()


@pytest.mark.parametrize("complex_modes", [False, True])
def test_without_channels(complex_modes):
    case = drawn(2, 5, 0, 3, complex_modes)
    for name, value in run(case.leaves(), "native", case).items():
        assert value.shape == (case.arguments.get(name, case.grad_state if name == "state" else case.grad_y)).shape


@pytest.mark.parametrize("gone", [-torch.inf, -1e30, -800.0, -709.0, -708.0, -700.0, -104.0])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_decays_that_leave_nothing(gone, complex_modes):
    case = drawn(2, 70, 3, 3, complex_modes)
    case.arguments["log_decay"].real[0] = gone
    case.arguments["log_decay"].real[:, 1] = gone
    actual = run(case.leaves(), "native", case)
    case.arguments["log_decay"].real[case.arguments["log_decay"].real < -200] = -200  # the same in float32
    exact = run(case.plain_leaves(torch.float64), "reference", case)
    for name, value in actual.items():
        bound = 1e-6 * (1 + by_channel(exact[name], name)) * (40 if name == "log_decay" else 4)
        assert (by_channel(value - exact[name], name) <= bound).all(), name


def test_without_decay_the_state_is_a_sum():
    """Small integers, with exact results, over more steps than a segment has."""
    u = torch.randint(-3, 4, (2, 1500, 17)).float()
    y, state = ops.ssm_scan(u, torch.zeros(17, 3), torch.ones(17, 3), return_state=True, backend="native")
    assert torch.equal(y, 3 * u.cumsum(1)) and torch.equal(state, u.sum(1)[..., None].expand(2, 17, 3))


@pytest.mark.parametrize("length", [1, 50, 700])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_is_a_convolution_with_its_kernel(length, complex_modes):
    case = drawn(2, length, 18, 4, complex_modes)
    u, log_decay, weight, skip, _ = case.arguments.values()
    kernel = ops.ssm_kernel(log_decay.to(torch.complex128), weight.to(torch.complex128), length)
    expected = ops.long_conv(u.double(), kernel) + skip * u.double()
    actual = ops.ssm_scan(u, log_decay, weight, skip=skip, backend="native")
    assert (by_channel(actual - expected, "y") <= 1e-6 * by_channel(expected, "y")).all()


def one_mode(u: Tensor, log_decay: complex) -> tuple[list[complex], complex]:
    """The states of one mode for inputs (L,), step by step in Python floats."""
    decay, x, states = complex(torch.tensor(log_decay, dtype=torch.complex128).exp()), 0j, []
    for value in u.tolist():
        x = decay * x + value
        states.append(x)
    return states, x


def slow_and_fast(complex_modes: bool) -> tuple[Tensor, Tensor]:
    log_decay = torch.tensor([[-1e-8, -1e-3, -1.0, -50.0], [-1e-8, -1e-8, -1e-5, -1e-2]])
    if complex_modes:
        return torch.complex(log_decay, torch.tensor([0.0, 0.3, -3.0, 1e5]).expand(2, 4)), torch.randn(2, 4) + 0.5j
    return log_decay, torch.randn(2, 4)


@pytest.mark.parametrize("complex_modes", [False, True])
def test_a_million_steps(complex_modes):
    """No drift: inputs with a mean give large states, whose last digits float32 would lose."""
    u = torch.rand(1, 1_000_000, 2)
    log_decay, weight = slow_and_fast(complex_modes)
    y, state = ops.ssm_scan(u, log_decay, weight, return_state=True, backend="native")
    wide = [x.to(torch.complex128 if complex_modes else torch.float64) for x in (log_decay, weight)]
    exact_y, exact_state = ops.ssm_scan(u.double(), *wide, return_state=True, backend="torch")
    assert ((state - exact_state).abs() <= 5e-7 * exact_state.abs()).all()
    # Sums over modes can cancel, so errors are relative to the terms. Slow modes matter late, so the end is checked
    # separately.
    terms = ops.ssm_scan(u.double(), wide[0].real, wide[1].abs(), backend="torch")
    for part in (slice(None), slice(-1000, None)):
        error, size = (y - exact_y)[:, part].abs().amax(1), terms[:, part].amax(1)
        assert (error <= 1e-6 * size).all(), (error / size).tolist()
    states, last = one_mode(u[0, :, 1], complex(wide[0][1, 0]))
    assert abs(complex(state[0, 1, 0]) - last) <= 2e-7 * abs(last)
    alone = ops.ssm_scan(u[..., 1:], log_decay[1:, :1], torch.ones_like(weight[1:, :1]), backend="native")
    states = torch.tensor(states, dtype=torch.complex128).real
    assert torch.allclose(alone[0, :, 0].double(), states, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("complex_modes", [False, True])
def test_gradients_over_a_hundred_thousand_steps(complex_modes):
    u = torch.rand(1, 100_000, 2)
    log_decay, weight = slow_and_fast(complex_modes)
    skip, initial_state = torch.randn(2), torch.randn(1, 2, 4).to(weight.dtype)
    arguments = {"u": u, "log_decay": log_decay, "weight": weight, "skip": skip, "initial_state": initial_state}
    case = NativeScanCase(
        arguments, {"reverse": False}, torch.rand(1, 100_000, 2), torch.rand(1, 2, 4).to(weight.dtype)
    )
    actual, exact = run(case.leaves(), "native", case), run(case.plain_leaves(torch.float64), "torch", case)
    sizes = in_absolute_values(case)
    for name, value in actual.items():
        # Each mode separately: the gradient of a slow mode is 1e10 times that of a fast one. Sums and states over
        # chunks are in double, so the error is little more than the rounding of the result.
        series = name in ("y", "u")
        error = (value - exact[name]).abs() / (sizes[name].amax() if series else sizes[name])
        assert (error <= (1e-6 if series else 1.5e-7)).all(), f"{name}: {error.max():.2g}"


@pytest.mark.parametrize("length", [1, 32, 33, 64, 100])
def test_powers_of_the_decay_are_exact_to_rounding(length):
    """Without inputs a state becomes decay^length; also for very small decays and huge angles."""
    real = torch.tensor([-1e-8, -1e-4, -0.1, -0.8, -5.0, -30.0, -60.0, -65.0])
    angle = torch.tensor([0.0, 1e-6, 0.5, 1.5707964, 3.1415927, -4.0, 7e3, -9.9e4, 1.1e5, 1e6, -1e10, 3e38])
    log_decay = torch.complex(*torch.meshgrid(real, angle, indexing="ij")).reshape(1, -1)
    for rate in (log_decay, real[None]):
        start = torch.ones(1, *rate.shape, dtype=rate.dtype)
        options = {"initial_state": start, "return_state": True, "backend": "native"}
        y, state = ops.ssm_scan(torch.zeros(1, length, 1), rate, torch.ones_like(rate), **options)
        # Python's sine and cosine, because those of torch may be inexact for huge angles.
        exact = torch.tensor([cmath.exp(complex(r)) ** length for r in rate[0].tolist()], dtype=torch.complex128)
        normal = exact.abs() > 1e-30  # smaller numbers may have a part that became 0
        assert ((state[0, 0] - exact).abs() <= 1.2e-7 * exact.abs())[normal].all()
        assert (y[0, -1, 0].double() - exact.real.sum()).abs() <= 1e-6 * exact.abs().sum()


def test_subnormal_numbers_are_as_before_after_a_call():
    """The kernel flushes them to 0 only while it runs, in the calling thread and in the other threads."""
    case = drawn(4, 100, 64, 2)
    with threads(2):
        run(case.leaves(), "native", case)
        assert (torch.full((1_000_000,), 1e-38) * 0.1).ne(0).all()


PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(4096, 1, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("weight", [1.0, 1 + 2**-8, 1 - 2**-9, 1 + 2**-11, 1 + 2**-12 + 2**-20, 3.0, 2.0**-12, 40000.0])
def test_every_half_number_is_read_and_rounded_as_torch_does(dtype, step, weight):
    """One step, y = weight u: exact in float32 except for the last weights, then rounded once."""
    u, weights = PATTERNS.view(dtype), torch.full((16, 1), weight)
    if step:
        y, state = ops.ssm_step(u[:, 0], 0 * weights, weights, torch.zeros(4096, 16, 1), backend="native")
        y = y[:, None]
    else:
        # log_decay -inf is a decay of 0
        y, state = ops.ssm_scan(u, -torch.inf * weights, weights, return_state=True, backend="native")
    expected = u.float() * weights[:, 0]
    # Subnormal float32 results may become 0; float16 results are never subnormal in float32.
    tiny = torch.finfo(torch.float32).tiny
    kept = (expected == 0) | (expected.abs() >= tiny)
    assert kept.logical_or(expected.isnan()).all() or dtype == torch.bfloat16
    expected = expected.to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[kept], expected[kept])
    kept = u.isfinite() & ((u == 0) | (u.abs().float() >= tiny))
    assert torch.equal(state[..., 0][kept[:, 0]], u.float()[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_nan_is_rounded_to_a_number(dtype):
    """All bits of the fraction are set, so that rounding by addition would carry into the sign."""
    weight = torch.full((16, 1), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    for sign in (1, -1):
        y = ops.ssm_scan(torch.ones(2, 40, 16, dtype=dtype), -torch.ones(16, 1), sign * weight, backend="native")
        assert y.isnan().all()
