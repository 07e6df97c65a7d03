"""The compiled attention kernel in float32 against the dense definition in float64, on every instruction set."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from tests.native import threads
from tests.ops.vq.operator_calls import attention_arguments
from tests.strategies import attention_cases

FLOOR = 2e-6  # relative: rounding of inputs and of the result itself


def attend(case, codes, backend, dtype):
    """The output, and the gradients of a fixed random objective, with given codes."""
    leaves = case.tensors(dtype)
    options = {**case.options, **({"bias": leaves["bias"]} if "bias" in leaves else {})}
    out = ops.vq_attention(
        leaves["q"], leaves["k"], leaves["v"], case.codebook.to(dtype), **options, codes=codes, backend=backend
    )
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True)),
    }


def assert_as_good_as_plain_float32(case, codes):
    """At most twice the error of the dense definition (or of the PyTorch backend) in float32."""
    exact = attend(case, codes, "reference", torch.float64)
    plain = [attend(case, codes, backend, torch.float32) for backend in ("reference", "torch")]
    for name, value in attend(case, codes, "native", torch.float32).items():
        assert value.shape == exact[name].shape and value.isfinite().all(), name
        if value.numel():
            error, *others = ((x.double() - exact[name]).abs().max() for x in (value, *(p[name] for p in plain)))
            # Where gradients of scores cancel, their rounding errors remain, and are multiplied by queries in dk.
            size = 1 + exact[name].abs().max() + (case.q.abs().max() if name == "k" else 0)
            assert error <= 2 * max(others) + FLOOR * size, (name, float(error), others)


def rounded(case):
    """The case with inputs that float32 represents exactly, and the codes of its keys."""
    for name in ("q", "k", "v"):
        x = getattr(case, name)
        x.copy_(x.float())
    case.codebook = case.codebook.float().double()
    if case.options["bias"] is not None:
        case.options["bias"] = case.options["bias"].float().double()
    return case, ops.vq_assign(case.k, case.codebook, backend="reference")


@given(attention_cases(max_length=230))
@settings(max_examples=120)
def test_equals_the_definition_with_gradients(case):
    assert_as_good_as_plain_float32(*rounded(case))


@given(st.data())
@settings(max_examples=40)
def test_widths_around_the_registers(data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    head_dim, value_dim, codes = (
        draw(8, 16, 64, 65, 128, 256),
        draw(1, 15, 16, 17, 64, 100, 256),
        draw(1, 8, 31, 64, 65, 300),
    )
    length, causal, window = draw(1, 71, 72, 73, 144, 150), draw(False, True), draw(0, 3, 64)
    q, k, v = (
        torch.randn(1, 2, length, head_dim),
        torch.randn(1, 1, length, head_dim),
        torch.randn(1, 1, length, value_dim),
    )
    codebook = torch.randn(1, codes, head_dim)
    options = {"causal": causal, "window": window, "codes": ops.vq_assign(k, codebook)}
    out = ops.vq_attention(q, k, v, codebook, backend="native", **options)
    exact = ops.vq_attention(q.double(), k.double(), v.double(), codebook.double(), backend="reference", **options)
    assert (out - exact).abs().max() < 1e-5 * (1 + exact.abs().max())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(
    "special", ["huge scores", "tiny scores", "one code", "equal keys", "no key", "far top masked", "far below 0"]
)
def test_extremes(causal, window, special):
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    codebook, mask = torch.randn(2, 24, 16), torch.zeros(1, 200, dtype=torch.bool)
    if special == "huge scores":
        q *= 1e4
    elif special == "tiny scores":
        q *= 1e-30
    elif special == "one code":
        codebook[:, 1:] += 1e3
    elif special == "equal keys":
        k[:] = 0.25
    elif special == "no key":
        mask[:] = True
    elif special == "far below 0":  # all scores: codes without far keys must not have a larger score
        q.abs_()
        k, codebook = -300 * k.abs(), -300 * codebook.abs()
    else:  # only masked keys have the largest scores: these must not make the other weights underflow
        codebook[:, 0] = 100.0
        k[:, :, ::2] = 100.0
        q.abs_()
        mask[:, ::2] = True
    options = {"causal": causal, "window": window, "key_padding_mask": mask, "codes": ops.vq_assign(k, codebook)}
    out = ops.vq_attention(q, k, v, codebook, backend="native", **options)
    exact, plain = (
        ops.vq_attention(q.to(t), k.to(t), v.to(t), codebook.to(t), backend="reference", **options)
        for t in (torch.float64, torch.float32)
    )
    assert out.isfinite().all()
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5


@given(attention_cases(max_length=300))
@settings(max_examples=15)
def test_any_number_of_threads_gives_the_same_bits(case):
    case, codes = rounded(case)
    tensors = [x.float() for x in (case.q, case.k, case.v, case.codebook)]
    options = dict(case.options, codes=codes, backend="native")
    if options["bias"] is not None:
        options["bias"] = options["bias"].float()
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(ops.vq_attention(*tensors, **options))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_python_threads_do_not_disturb_each_other():
    cases = [torch.randn(3, 1, 2, 300, 16) for _ in range(4)]
    codebook, found = torch.randn(2, 20, 16), {}

    def call(i):
        found[i] = [ops.vq_attention(*cases[i], codebook, causal=True, window=9, backend="native") for _ in range(5)]

    expected = [ops.vq_attention(*case, codebook, causal=True, window=9, backend="native") for case in cases]
    workers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(x, expected[i]) for i in range(4) for x in found[i])


@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_independent_of_the_batch_and_the_future(causal):
    q, k, v = (torch.randn(3, 2, 250, 8) for _ in range(3))
    codebook, options = torch.randn(2, 16, 8), {"causal": causal, "window": 9, "backend": "native"}
    whole = ops.vq_attention(q, k, v, codebook, **options)
    assert torch.equal(whole[1:2], ops.vq_attention(q[1:2], k[1:2], v[1:2], codebook, **options))
    if causal:
        cut = ops.vq_attention(q[:, :, :100], k[:, :, :100], v[:, :, :100], codebook, **options)
        assert (whole[:, :, :100] - cut).abs().max() < 1e-6


def test_keys_without_query_heads_have_zero_gradients():
    q, k, v = torch.randn(1, 0, 5, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 3)
    codes = torch.zeros(1, 1, 5, dtype=torch.int64)
    args = attention_arguments(q, k, v, torch.randn(1, 6, 4), codes)
    out, normalizers = torch.ops.longvq.vq_attention(*args)
    torch.empty(1000).fill_(3.0)  # so that uninitialised memory is not zero
    _, dk, dv, *_ = torch.ops.longvq.vq_attention_backward(out, out, normalizers, *args)
    assert not dk.any() and not dv.any()


def test_wrong_direct_calls_raise():
    q, k, v, codebook = torch.randn(1, 2, 5, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 3), torch.randn(1, 6, 4)
    codes = torch.zeros(1, 1, 5, dtype=torch.int64)
    right = attention_arguments(q, k, v, codebook, codes)
    torch.ops.longvq.vq_attention(*right)
    for place, wrong, message in (
        (0, q.double(), "float32"),
        (
            1,
            torch.randn(1, 1, 6, 4),
            r"k must be \(B, Hkv, L, D\) = \(1, any, 5, 4\) float32 on the CPU, got \(1, 1, 6, 4\)",
        ),
        (3, torch.randn(2, 6, 4), "codebook must be"),
        (4, codes + 6, r"codes must lie in \[0, S\)"),
        (4, codes.int(), "int64"),
        (5, torch.randn(2, 2), "bias must be"),
        (6, torch.zeros(1, 4, dtype=torch.bool), "key_padding_mask must be"),
        (12, -1, "window must be at least 0, got -1"),
        (13, 2, "activation must be 0 or 1, got 2"),
        (14, -1, "local_keys must be 0 or 1, got -1"),
        (15, 2, "key_grad must be 0 or 1, got 2"),
    ):
        arguments = list(right)
        arguments[place] = wrong
        with pytest.raises(RuntimeError, match=message):
            torch.ops.longvq.vq_attention(*arguments)
