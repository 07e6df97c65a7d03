"""Helpers for the tests of the compiled scan and step."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from longvq_layers import ops
from tests.strategies import NativeScanCase, in_precision

CHANNEL_AXIS = {"y": 2, "state": 1, "u": 2, "log_decay": 0, "weight": 0, "skip": 0, "initial_state": 1}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(
    batch: int, length: int, channels: int, modes: int, complex_modes: bool = True, dtype=torch.float32, reverse=False
) -> NativeScanCase:
    """A case with all optional arguments, and decays of time scales from one step to a million steps."""
    family = torch.complex64 if complex_modes else torch.float32
    log_decay = -torch.rand(channels, modes) * torch.tensor([1.0, 1e-2, 1e-4, 1e-8])[torch.arange(modes) % 4]
    arguments = {
        "u": torch.randn(batch, length, channels).to(dtype),
        "log_decay": torch.complex(log_decay, torch.randn(channels, modes)) if complex_modes else log_decay,
        "weight": torch.randn(channels, modes, dtype=family),
        "skip": torch.randn(channels),
        "initial_state": torch.randn(batch, channels, modes, dtype=family),
    }
    options = {"key_padding_mask": torch.rand(batch, length) < 0.1, "reverse": reverse}
    grad_y, grad_state = torch.randn(batch, length, channels).to(dtype), torch.randn(batch, channels, modes).to(family)
    return NativeScanCase(arguments, options, grad_y, grad_state)


def run(leaves: dict[str, Tensor], backend: str, case: NativeScanCase) -> dict[str, Tensor]:
    """y, the state, and the gradient of every argument through both."""
    y, state = ops.ssm_scan(**leaves, **case.options, return_state=True, backend=backend)
    pairs = [(y, case.grad_y), (state, case.grad_state)]
    if backend != "native":
        pairs = [(x, in_precision(grad, x.real.dtype)) for x, grad in pairs]
    # For an empty sequence the reference does not use all arguments and outputs.
    outputs, grads = zip(*[(x, grad) for x, grad in pairs if x.requires_grad], strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), "state": state.detach(), **dict(zip(leaves, gradients, strict=True))}


def in_absolute_values(case: NativeScanCase) -> dict[str, Tensor]:
    """For each result the sum of the absolute values of its terms, to which rounding errors are relative."""
    leaves = {n: x.real if n == "log_decay" else x.abs() for n, x in case.plain_leaves(torch.float64).items()}
    sizes = NativeScanCase({}, case.options, case.grad_y.abs(), case.grad_state.abs())
    return run({n: x.detach().requires_grad_() for n, x in leaves.items()}, "torch", sizes)


def by_channel(x: Tensor, name: str) -> Tensor:
    """The largest absolute value of each channel. Channels are independent, so each is compared on its own."""
    x = x.abs().movedim(CHANNEL_AXIS[name], 0).unsqueeze(-1).flatten(1)
    return x.amax(1) if x.shape[1] else x.new_zeros(x.shape[0])


def assert_as_good_as_plain_float32(case: NativeScanCase, oracle: str = "reference") -> None:
    """At most twice the error that a plain float32 computation makes, plus a floor.

    The floor is a few roundings of the terms. It is for results that the plain computation happens to compute exactly,
    such as a single step from a zero state: the kernel adds skip to the first tap and multiplies by the sum. With half
    precision the result is also rounded once.
    """
    exact, sizes = run(case.plain_leaves(torch.float64), oracle, case), in_absolute_values(case)
    plain = [run(case.plain_leaves(torch.float32), backend, case) for backend in {oracle, "torch"}]
    actual = run(case.leaves(), "native", case)
    for name, value in actual.items():
        expected = exact[name]
        assert value.shape == expected.shape and value.is_complex() == expected.is_complex(), name
        assert value.real.dtype == (case.arguments["u"].dtype if name in ("y", "u") else torch.float32), name
        error = (value.resolve_conj().to(expected.dtype) - expected).abs()
        if value.dtype in (torch.bfloat16, torch.float16):
            info = torch.finfo(value.dtype)  # half a unit in the last place, which is a constant for subnormal numbers
            error = (error - expected.abs() * info.eps / 2 - info.tiny * info.eps / 2).clamp(min=0)
        allowed = 2 * torch.stack([by_channel(p[name] - expected, name) for p in plain]).amax(0)
        allowed = allowed + 4 * torch.finfo(torch.float32).eps * by_channel(sizes[name], name)
        error = by_channel(error, name)
        assert (error <= allowed).all(), f"{name}: error {error.tolist()}, allowed {allowed.tolist()}"
