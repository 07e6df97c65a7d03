"""What the tests of the compiled scan and step share."""

import contextlib
from collections.abc import Iterator

import torch
from strategies import NativeScanCase, in_precision
from torch import Tensor

from longvq_layers import ops


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
    """Everything present, decays from 1 over a step to none over a million."""
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
    """y, the state, and the gradient of every argument through both of them."""
    y, state = ops.ssm_scan(**leaves, **case.options, return_state=True, backend=backend)
    pairs = [(y, case.grad_y), (state, case.grad_state)]
    if backend != "native":
        pairs = [(x, in_precision(grad, x.real.dtype)) for x, grad in pairs]
    # Of an empty sequence the reference leaves some arguments and outputs unused.
    outputs, grads = zip(*[(x, grad) for x, grad in pairs if x.requires_grad], strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), "state": state.detach(), **dict(zip(leaves, gradients, strict=True))}
