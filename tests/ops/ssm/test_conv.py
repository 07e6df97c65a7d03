"""long_conv: against the dense form and the plain float32 FFT; any length, layout, dtype and magnitude."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from longvq_layers.ops.torch.conv import fast_length
from tests.largest import LargestTensor
from tests.strategies import LAYOUTS, layout
from tests.tolerances import assert_close

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)


@st.composite
def conv_cases(draw):
    """u (B, L, H) and kernel (H, K) in float64: empty, single elements, K below, equal to and above L; any strides."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, channels = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 3, 17]))
    length, taps = (draw(st.one_of(st.sampled_from([0, 1, 2, 64]), st.integers(0, 150))) for _ in range(2))
    if draw(st.booleans()):
        taps = length
    u = layout(torch.randn(batch, length, channels, dtype=torch.float64), draw(st.sampled_from(LAYOUTS)))
    kernel = torch.randn(channels, taps, dtype=torch.float64)
    kind = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "expanded u"]))
    if kind == "expanded":  # all channels share one kernel
        kernel = kernel[:1].expand(channels, taps) if channels else kernel
    elif kind == "expanded u" and batch:
        u = u[:1].expand(u.shape)
    elif kind == "transposed":
        kernel = kernel.t().contiguous().t()
    elif kind == "sliced":
        kernel = torch.cat([kernel, kernel], 1)[:, taps:]
    return u, kernel


def run(u, kernel, backend):
    """y and both gradients; the gradient of y is the same in all precisions."""
    u, kernel = u.detach().requires_grad_(), kernel.detach().requires_grad_()
    y = ops.long_conv(u, kernel, backend=backend)
    torch.manual_seed(1)
    grad_y = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return {"y": y, **dict(zip(("u", "kernel"), torch.autograd.grad(y, (u, kernel), grad_y), strict=True))}


@given(conv_cases())
@settings(max_examples=150)
def test_equals_the_dense_form_with_gradients(case):
    actual, expected = (run(*case, backend) for backend in ("torch", "reference"))
    for name, value in actual.items():
        assert_close(value, expected[name], name)


@pytest.mark.parametrize("kernel_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=conv_cases())
@settings(max_examples=10)
def test_any_pair_of_dtypes(dtype, kernel_dtype, case):
    u, kernel = case[0].to(dtype), case[1].to(kernel_dtype)
    actual = run(u, kernel, "auto")
    # The oracle gets the rounded arguments and the same gradient of y, in double.
    expected = run(u.double(), kernel.double(), "reference")
    assert actual["y"].dtype == actual["u"].dtype == dtype and actual["kernel"].dtype == kernel_dtype
    arithmetic = torch.promote_types(
        dtype, torch.float32
    )  # a float64 kernel does not change the precision for a float32 u
    for name, value in actual.items():
        precisions = [dtype, kernel_dtype, arithmetic]
        worst = max(precisions if name == "kernel" else precisions[::2], key=lambda d: torch.finfo(d).eps)
        assert_close(value, expected[name], name, dtype=worst)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types_accumulate_in_float32(dtype):
    """The float32 result, rounded once, for sums of any length; sums in half precision would stop growing."""
    u, kernel = torch.ones(1, 5000, 2, dtype=dtype), torch.ones(2, 5000, dtype=dtype)
    y = ops.long_conv(u, kernel)
    exact = torch.arange(1.0, 5001.0)[None, :, None].expand(1, -1, 2)
    # The error of the transform is relative to its largest result, and depends on the processor.
    allowed = 0.5001 * torch.finfo(dtype).eps * exact + 2 * torch.finfo(torch.float32).eps * exact.max()
    assert ((y.double() - exact).abs() <= allowed).all()
    assert torch.equal(ops.long_conv(u, kernel), ops.long_conv(u.float(), kernel.float()).to(dtype))


def plain(u, kernel):
    """A plain FFT convolution in the precision of the arguments."""
    n = 2 * u.shape[1]
    spectrum = torch.fft.rfft(u, n=n, dim=1) * torch.fft.rfft(kernel[:, : u.shape[1]], n=n).t()
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, : u.shape[1]]


@given(
    st.integers(1, 2000),
    st.integers(1, 2500),
    st.sampled_from([1e-36, 1e-15, 1.0, 1e15, 1e33]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]),
    st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_error_is_at_most_twice_that_of_the_plain_transform(length, taps, u_size, kernel_size, seed):
    torch.manual_seed(seed)
    u, kernel = torch.randn(2, length, 3) * u_size, torch.randn(3, taps) * kernel_size
    exact, baseline, ours = plain(u.double(), kernel.double()), plain(u, kernel).double(), ops.long_conv(u, kernel)
    if not baseline.isfinite().all():
        return
    assert ours.isfinite().all()
    scale = exact.abs().max()
    floor = 1e-7 * scale + torch.finfo(torch.float32).tiny  # one rounding of the largest value; underflow
    assert (ours - exact).abs().max() <= 2 * (baseline - exact).abs().max() + floor


def test_results_beyond_the_range_of_half_overflow_to_infinity_only_there():
    u = torch.full((1, 4, 1), 4e4, dtype=torch.float16)
    y = ops.long_conv(u, torch.ones(1, 2)).flatten()
    assert y[0] == u[0, 0, 0] and y[1:].isinf().all()


def test_gradcheck():
    u = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    for taps in (1, 4, 7, 9):
        kernel = torch.randn(2, taps, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(ops.long_conv, (u, kernel))
        assert torch.autograd.gradgradcheck(ops.long_conv, (u, kernel))
    shared = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, kernel: ops.long_conv(u, kernel.expand(2, 5)), (u, shared))


def test_one_argument_may_need_no_gradient():
    u, kernel = torch.randn(1, 9, 2), torch.randn(2, 5)
    expected = run(u, kernel, "reference")
    for name, leaf in (("u", u), ("kernel", kernel)):
        leaf.requires_grad_()
        torch.manual_seed(1)
        grad_y = torch.randn(1, 9, 2, dtype=torch.float64).float()
        assert_close(torch.autograd.grad(ops.long_conv(u, kernel), leaf, grad_y)[0], expected[name], name)
        leaf.requires_grad_(False)
    assert not ops.long_conv(u, kernel).requires_grad


def test_compiles_without_graph_breaks_for_changing_lengths():
    call = torch.compile(lambda u, kernel: ops.long_conv(u, kernel), fullgraph=True, backend="aot_eager")
    # One program for the first length and one for all others; a program per length would exceed the limit.
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in (50, 60, 70, 301):
            leaves = torch.randn(2, length, 3).bfloat16().requires_grad_(), torch.randn(3, length).requires_grad_()
            out, expected = call(*leaves), ops.long_conv(*leaves)
            assert out.dtype == torch.bfloat16
            assert_close(out, expected, "y")
            for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected)), strict=True):
                assert_close(a, b, "gradient", dtype=torch.bfloat16)


def test_the_result_is_contiguous_and_the_arguments_stay():
    u, kernel = torch.randn(2, 30, 4), torch.randn(4, 50)
    before = u.clone(), kernel.clone()
    assert ops.long_conv(u, kernel).is_contiguous()
    assert torch.equal(u, before[0]) and torch.equal(kernel, before[1])


def test_memory_is_linear():
    """The largest tensor is the spectrum or the padded result, at most about twice as large as the input."""
    for length, taps in ((8192, 8192), (8191, 20_000), (10_007, 3)):
        u = torch.randn(1, length, 4, requires_grad=True)
        kernel = torch.randn(4, taps, requires_grad=True)
        with LargestTensor() as mode:
            ops.long_conv(u, kernel).sum().backward()
        steps = length + min(length, taps)
        assert mode.bytes <= max(1.15 * steps, taps) * 4 * 4 + 64
        y = ops.long_conv(u, kernel)
        assert y.untyped_storage().size() == 4 * y.numel()  # not a view that keeps the padded result alive


def test_long_sequences_have_no_drift():
    u, kernel = torch.randn(1, 100_003, 1), torch.randn(1, 100_003).cumsum(1)
    exact = ops.long_conv(u.double(), kernel.double())
    assert (ops.long_conv(u, kernel) - exact).abs().max() / exact.abs().max() < 1e-6
    direct = torch.nn.functional.conv1d(u[:, :300].double().mT, kernel[:, :300].double().flip(1)[None], padding=299).mT[
        :, :300
    ]
    assert_close(exact[:, :300], direct, "double precision", dtype=torch.float32)


@given(st.integers(1, 10**6))
def test_fast_length_is_the_least_product_of_2_3_5(n):
    def smooth(m):
        for p in (2, 3, 5):
            while m % p == 0:
                m //= p
        return m == 1

    found = fast_length(n)
    assert found >= n and smooth(found)
    assert not any(smooth(m) for m in range(n, min(found, n + 2000)))


def test_bad_input_is_refused_by_name():
    u = torch.zeros(1, 5, 3)
    bad = {
        "u must have 3 dimensions": (ValueError, u[0], torch.ones(3, 2)),
        "kernel must have 2 dimensions": (ValueError, u, torch.ones(3)),
        "kernel must have shape": (ValueError, u, torch.ones(2, 4)),
        "kernel must be a real floating-point": (TypeError, u, torch.ones(3, 2).cfloat()),
        "u must be a real floating-point": (TypeError, u.long(), torch.ones(3, 2)),
    }
    for message, (error, *arguments) in bad.items():
        with pytest.raises(error, match=message):
            ops.long_conv(*arguments)
    with pytest.raises(NotImplementedError, match="no compiled kernel"):
        ops.long_conv(u, torch.ones(3, 2), backend="native")
