"""ssm_scan, ssm_kernel and long_conv: against the recurrence, against each other, and split at any position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from tests.largest import LargestTensor
from tests.strategies import scan_cases
from tests.tolerances import assert_close


def run(leaves, backend, options):
    y, state = ops.ssm_scan(**leaves, **options, return_state=True, backend=backend)
    torch.manual_seed(1)
    # Drawn in double and rounded, so that all precisions get equal values. An empty sequence does not use all leaves.
    wide = torch.complex128 if state.is_complex() else torch.float64
    pairs = [(y, torch.randn(y.shape, dtype=torch.float64)), (state, torch.randn(state.shape, dtype=wide))]
    outputs, grads = zip(*[(x, grad.to(x.dtype)) for x, grad in pairs if x.requires_grad], strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
    return {"y": y, "state": state, **dict(zip(leaves, gradients, strict=True))}


@given(scan_cases())
@settings(max_examples=100)
def test_torch_equals_recurrence_with_gradients(case):
    expected, actual = (run(case.tensors(), backend, case.options) for backend in ("reference", "torch"))
    for name, value in actual.items():
        assert_close(value, expected[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=scan_cases(max_length=150))
@settings(max_examples=25)
def test_lower_precisions(dtype, case):
    leaves = case.tensors(dtype)
    # The oracle gets the rounded parameters and inputs, in double.
    exact = {n: x.detach().to(torch.complex128 if x.is_complex() else torch.float64) for n, x in leaves.items()}
    exact = {n: x.requires_grad_() for n, x in exact.items()}
    actual, expected = run(leaves, "auto", case.options), run(exact, "reference", case.options)
    for name in ("y", "state", "u"):
        assert_close(actual[name], expected[name], name, dtype=dtype)


@given(scan_cases(), st.integers(0, 200))
@settings(max_examples=40)
def test_split_anywhere_gives_the_same(case, cut):
    leaves = {n: x.detach() for n, x in case.tensors().items()}
    y, state = ops.ssm_scan(**leaves, **case.options, return_state=True)
    u, start, mask = leaves.pop("u"), leaves.pop("initial_state", None), case.options["key_padding_mask"]
    reverse = case.options["reverse"]
    parts = [None, None]
    for i in (1, 0) if reverse else (0, 1):
        part = slice(cut, None) if i else slice(0, cut)
        options = {"key_padding_mask": None if mask is None else mask[:, part], "reverse": reverse}
        parts[i], start = ops.ssm_scan(u[:, part], **leaves, **options, initial_state=start, return_state=True)
    assert_close(torch.cat(parts, 1), y, "y")
    assert_close(start, state, "state")


@given(scan_cases(max_length=20), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=30)
def test_steps_equal_the_scan(case, dtype):
    leaves = {n: x.detach() for n, x in case.tensors(dtype).items()}
    u, log_decay, weight = (leaves[name] for name in ("u", "log_decay", "weight"))
    expected, last = ops.ssm_scan(**leaves, return_state=True, backend="reference")
    for backend in ("auto", "torch", "reference"):
        state = leaves.get("initial_state", torch.zeros_like(last))
        for t in range(u.shape[1]):
            before = state.clone()
            y, new = ops.ssm_step(u[:, t], log_decay.exp(), weight, state, skip=leaves.get("skip"), backend=backend)
            assert torch.equal(state, before), "the state was modified"
            assert_close(y, expected[:, t], f"y at {t}", dtype=dtype)
            state = new
        assert_close(state, last, "state")


@given(scan_cases())
@settings(max_examples=30)
def test_scan_is_convolution_with_its_kernel(case):
    leaves = {n: x.detach() for n, x in case.tensors().items()}
    leaves.pop("initial_state", None)
    length = leaves["u"].shape[1]
    kernel = ops.ssm_kernel(leaves["log_decay"], leaves["weight"], length)
    assert_close(kernel, ops.ssm_kernel(leaves["log_decay"], leaves["weight"], length, backend="reference"), "kernel")
    conv = ops.long_conv(leaves["u"], kernel)
    if "skip" in leaves:
        conv = conv + leaves["skip"] * leaves["u"]
    assert_close(ops.ssm_scan(**leaves), conv, "y")


@given(st.integers(0, 90), st.integers(0, 120), st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40)
def test_long_conv_equals_the_dense_form(length, taps, batch, dtype):
    u, kernel = torch.randn(batch, length, 3).to(dtype).requires_grad_(), torch.randn(3, taps, requires_grad=True)
    results = []
    for backend in ("torch", "reference"):
        y = ops.long_conv(u, kernel, backend=backend)
        results.append((y, *torch.autograd.grad(y.sum(), (u, kernel))))
    for name, actual, expected in zip(("y", "u", "kernel"), *results, strict=True):
        assert_close(actual, expected, name, dtype=dtype)


@pytest.mark.parametrize("family", [torch.float64, torch.complex128])
def test_gradcheck(family):
    u, skip = torch.randn(1, 7, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    log_decay = (-torch.rand(2, 3, dtype=torch.float64)).to(family)
    if family.is_complex:
        log_decay += 1j * torch.randn(2, 3, dtype=torch.float64)
    weight, state = torch.randn(2, 3, dtype=family), torch.randn(1, 2, 3, dtype=family)
    leaves = [x.requires_grad_() for x in (u, log_decay, weight, skip, state)]
    options = {"return_state": True, "key_padding_mask": torch.arange(7)[None] == 2}

    for reverse in (False, True):

        def call(u, log_decay, weight, skip, state, reverse=reverse):
            return ops.ssm_scan(u, log_decay, weight, skip=skip, initial_state=state, reverse=reverse, **options)

        # gradcheck changes log_decay by 1e-6; no value is that close to the stability bound.
        assert torch.autograd.gradcheck(call, leaves)

    def step(u, decay, weight, skip, state):
        return ops.ssm_step(u[:, 0], decay, weight, state, skip=skip)

    assert torch.autograd.gradcheck(step, [leaves[0], log_decay.detach().exp().requires_grad_(), *leaves[2:]])


@pytest.mark.parametrize("namespace", ["longvq", "longvq_torch"])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_opcheck(namespace, complex_modes):
    u, skip = torch.randn(2, 70, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    log_decay = -torch.rand(3, 4)
    log_decay = (torch.complex(log_decay, torch.randn(3, 4)) if complex_modes else log_decay).requires_grad_()
    weight = torch.randn(3, 4, dtype=log_decay.dtype, requires_grad=True)
    state = torch.randn(2, 3, 4, dtype=log_decay.dtype, requires_grad=True)
    op = getattr(torch.ops, namespace).ssm_scan.default
    mask = torch.rand(2, 70) < 0.2
    torch.library.opcheck(op, (u, log_decay, weight, skip, state, mask, None, True))
    torch.library.opcheck(op, (u, log_decay, weight, None, None, None, None, False))
    step = getattr(torch.ops, namespace).ssm_step.default
    decay = log_decay.detach().exp().requires_grad_()
    torch.library.opcheck(step, (u[:, 0].detach().requires_grad_(), decay, weight, skip, state))


def test_compiles_without_graph_breaks_and_gives_the_same_values():
    u = torch.randn(2, 100, 3, requires_grad=True)
    log_decay = torch.complex(-torch.rand(3, 4), torch.randn(3, 4))
    weight = torch.randn(3, 4, dtype=torch.complex64)

    def call(u):
        return ops.ssm_scan(u, log_decay, weight)

    out, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(u), call(u)
    assert_close(out, expected, "y")
    assert_close(*(torch.autograd.grad(x.square().sum(), u)[0] for x in (out, expected)), "gradient")


@pytest.mark.parametrize("rate", [-1e-8, -1e-3, -50.0])
def test_long_sequences_keep_their_tail(rate):
    """For every decay, 100,000 steps in float32 are as close to the recurrence in double as 64 steps."""
    length = 100_000
    u = torch.randn(1, length, 1)
    log_decay, weight = torch.tensor([[complex(rate, 0.3)]]), torch.ones(1, 1, dtype=torch.complex64)
    y = ops.ssm_scan(u, log_decay, weight)
    exact = ops.ssm_scan(u.double(), log_decay.to(torch.complex128), weight.to(torch.complex128))
    assert ((y - exact).abs().max() / exact.abs().max()) < 1e-6
    direct = ops.ssm_scan(u.double()[:, :300], log_decay.cdouble(), weight.cdouble(), backend="reference")
    assert_close(exact[:, :300], direct, "double precision")


def test_no_buffer_of_modes_times_length():
    length, channels, modes = 16384, 8, 32
    u = torch.randn(1, length, channels)
    log_decay = torch.complex(-torch.rand(channels, modes), torch.randn(channels, modes))
    with LargestTensor() as mode:
        arguments = (u, log_decay, log_decay, None, None, None, None, False)
        y, state = torch.ops.longvq_torch.ssm_scan(*arguments)
        torch.ops.longvq_torch.ssm_scan_backward(y, state, *arguments, True, True)
    assert mode.bytes <= 4 * u.numel() * 4  # bytes: four times the input, not `modes` times


U, LOG, WEIGHT = torch.zeros(1, 5, 3), -torch.ones(3, 2), torch.ones(3, 2)
BAD = {
    "rank": (dict(u=torch.zeros(5, 3)), ValueError, "u must have 3 dimensions"),
    "complex u": (dict(u=U.cfloat()), TypeError, "u must be a real floating-point"),
    "channels": (dict(log_decay=-torch.ones(2, 2), weight=torch.ones(2, 2)), ValueError, "log_decay must have shape"),
    "precision": (dict(u=U.double()), TypeError, "log_decay must be torch.float64"),
    "half modes": (dict(log_decay=LOG.half(), weight=WEIGHT.half()), TypeError, "half precision can.t represent"),
    "weight family": (dict(weight=WEIGHT.cfloat()), TypeError, "weight must have the dtype of log_decay"),
    "weight shape": (dict(weight=torch.ones(3, 4)), ValueError, "weight must have shape"),
    "no modes": (dict(log_decay=-torch.ones(3, 0), weight=torch.ones(3, 0)), ValueError, "at least one mode"),
    "unstable": (dict(log_decay=-LOG), ValueError, "must have a real part ≤ 0"),
    "NaN decay": (dict(log_decay=LOG * torch.nan), ValueError, "must have a real part ≤ 0"),
    "skip": (dict(skip=torch.ones(2)), ValueError, "skip must have shape"),
    "skip dtype": (dict(skip=torch.ones(3).double()), TypeError, "skip must be torch.float32"),
    "state": (dict(initial_state=torch.ones(1, 3, 3)), ValueError, "initial_state must have shape"),
    "state dtype": (dict(initial_state=torch.ones(1, 3, 2).cfloat()), TypeError, "initial_state must have the dtype"),
    "native": (
        dict(u=U.double(), log_decay=LOG.double(), weight=WEIGHT.double(), backend="native"),
        NotImplementedError,
        "has compiled kernels for torch.float32",
    ),
    "mask": (dict(key_padding_mask=torch.zeros(1, 5)), TypeError, "key_padding_mask must be bool"),
    "mask shape": (dict(key_padding_mask=torch.zeros(1, 4) > 0), ValueError, "key_padding_mask must have shape"),
    "reverse": (dict(reverse=1), TypeError, "reverse must be a bool"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        ops.ssm_scan(**{"u": U, "log_decay": LOG, "weight": WEIGHT, **changes})


def test_other_operators_refuse_bad_input_by_name():
    with pytest.raises(ValueError, match="length must be at least 0"):
        ops.ssm_kernel(LOG, WEIGHT, -1)
    with pytest.raises(TypeError, match="length must be an int"):
        ops.ssm_kernel(LOG, WEIGHT, 3.0)
    with pytest.raises(ValueError, match="kernel must have shape"):
        ops.long_conv(U, torch.ones(2, 4))


def test_autocast_changes_neither_values_nor_gradients():
    u = torch.randn(2, 100, 3, requires_grad=True)
    log_decay = torch.complex(-torch.rand(3, 4), torch.randn(3, 4)).requires_grad_()
    weight = torch.randn(3, 4, dtype=torch.complex64, requires_grad=True)
    kernel = torch.randn(3, 20, requires_grad=True)

    def call():
        y = ops.ssm_scan(u, log_decay, weight) + ops.long_conv(u, kernel)
        gradients = torch.autograd.grad(y.square().sum(), (u, log_decay, weight, kernel))
        return y, *gradients, ops.ssm_kernel(log_decay, weight, 50)

    plain = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call()
    for a, b in zip(inside, plain, strict=True):
        assert torch.equal(a, b)
