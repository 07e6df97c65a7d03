"""The kernels of `csrc/cuda/ssm` against the definition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native import by_channel
from tests.strategies import NativeScanCase, in_precision, native_scan_cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Errors relative to the sum of the absolute terms: one rounded decay over up to 31 steps; in bfloat16, rounded tables.
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-20, torch.bfloat16: 2**-8}


NAMES = ("u", "log_decay", "weight", "skip", "initial_state")


def call(namespace, arguments, options, grad_y, grad_state):
    """y, the final state, and the gradients of the given arguments."""
    inputs = [*(arguments.get(name) for name in NAMES), options["key_padding_mask"]]
    inputs += [options.get("cu_seqlens"), options["reverse"]]
    y, state = namespace.ssm_scan(*inputs)
    gradients = namespace.ssm_scan_backward(grad_y, grad_state, *inputs, True, True)
    found = {f"d{name}": x for name, x in zip(NAMES, gradients, strict=True) if name in arguments}
    return {"y": y, "state": state, **found}


def assert_right(kernels, case: NativeScanCase):
    dtype = case.arguments["u"].dtype
    precise = {name: in_precision(x, torch.float64) for name, x in case.arguments.items()}
    grads = [in_precision(x, torch.float64) for x in (case.grad_y, case.grad_state)]
    sizes = {name: x.real if name == "log_decay" else x.abs() for name, x in precise.items()}
    definition = torch.ops.longvq_torch
    results = call(kernels, case.arguments, case.options, case.grad_y, case.grad_state)
    exact = call(definition, precise, case.options, *grads)
    size = call(definition, sizes, case.options, grads[0].abs(), grads[1].abs())
    for name, value in results.items():
        expected = exact[name]
        assert value.shape == expected.shape and value.is_complex() == expected.is_complex(), name
        error = (value.to(expected.dtype) - expected).abs()
        if name in ("y", "du") and dtype != torch.float32:
            info = torch.finfo(dtype)
            error = (error - expected.abs() * info.eps / 2 - info.tiny).clamp(min=0)
        axis = name.removeprefix("d")
        allowed = ROUNDING[dtype] * by_channel(size[name], axis) + 1e-30
        error = by_channel(error, axis)
        assert (error <= allowed).all(), (name, error / allowed)


@pytest.mark.parametrize("packed", [False, True])
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=40)
def test_equals_the_definition(kernels, packed, data, dtype):
    assert_right(kernels, data.draw(native_scan_cases(dtype, packed=packed)))


def drawn(batch, length, channels, modes, dtype, **options):
    log_decay = -torch.rand(channels, modes) * torch.tensor([1.0, 1e-2, 1e-4, 1e-8])[torch.arange(modes) % 4]
    arguments = {
        "u": torch.randn(batch, length, channels).to(dtype),
        "log_decay": torch.complex(log_decay, torch.randn(channels, modes)),
        "weight": torch.randn(channels, modes, dtype=torch.complex64),
        "skip": torch.randn(channels),
        "initial_state": torch.randn(batch, channels, modes, dtype=torch.complex64),
    }
    grads = torch.randn(batch, length, channels).to(dtype), torch.randn(batch, channels, modes, dtype=torch.complex64)
    return NativeScanCase(arguments, {"key_padding_mask": None, "reverse": False, **options}, *grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1023, 1024, 1025, 2048, 3 * 1024 + 33])
def test_lengths_around_the_tiles(kernels, dtype, length):
    assert_right(kernels, drawn(1, length, 9, 17, dtype))


@pytest.mark.parametrize("channels", [8, 16, 24, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectorized_channels(kernels, dtype, channels):
    """Kernels read the channels of a step in one access if they are aligned, otherwise one by one."""
    case = drawn(2, 100, channels, 3, dtype, key_padding_mask=torch.rand(2, 100) < 0.2)
    assert_right(kernels, case)
    case.arguments["u"] = torch.randn(2, 100, channels + 1).to(dtype)[:, :, 1:]
    assert_right(kernels, case)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments(kernels, dtype, reverse):
    """A long sequence with few channels is cut into segments, which run at the same time."""
    mask = torch.rand(2, 13_000) < 0.1
    assert_right(kernels, drawn(2, 13_000, 2, 5, dtype, reverse=reverse, key_padding_mask=mask))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(0, 6_000, 1, 0, 5_000, 1_025, 974, 0), (13_000,), (0, 0, 13_000)])
def test_packed_documents_in_segments(kernels, lengths, reverse):
    length, documents = sum(lengths), len(lengths)
    mask, offsets = torch.rand(1, length) < 0.1, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    case = drawn(1, length, 2, 5, torch.float32, reverse=reverse, key_padding_mask=mask, cu_seqlens=offsets)
    case.arguments["initial_state"] = torch.randn(documents, 2, 5, dtype=torch.complex64)
    case.grad_state = torch.randn(documents, 2, 5, dtype=torch.complex64)
    assert_right(kernels, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_makes_no_difference(on_host, thread_order, dtype):
    case = drawn(1, 1100, 9, 20, dtype, key_padding_mask=torch.rand(1, 1100) < 0.1)
    results = []
    for order in (0, 1, 2, 3):
        thread_order(order)
        results.append(call(on_host, case.arguments, case.options, case.grad_y, case.grad_state))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_wrong_arguments(kernels):
    case = drawn(1, 20, 3, 2, torch.float32)
    good = case.arguments
    for name, wrong, message in [
        ("weight", good["weight"].real, "weight must be .* in the dtype of log_decay, got .* float32"),
        ("skip", good["skip"][:2], "skip must be"),
        ("initial_state", good["initial_state"][:, :2], "initial_state must be"),
        ("u", good["u"].double(), "float32, bfloat16 or float16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(kernels, {**good, name: wrong}, case.options, case.grad_y, case.grad_state)
    with pytest.raises(RuntimeError, match="no CUDA kernel for these sizes"):
        many = drawn(1, 20, 3, 33, torch.float32)
        call(kernels, many.arguments, many.options, many.grad_y, many.grad_state)
