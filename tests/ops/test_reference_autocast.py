"""The reference of the state space operators: equal results under autocast, no memory shared with the inputs."""

import pytest
import torch

from longvq_layers import ops

H, N, L = 4, 3, 40


def arguments(dtype=torch.complex64):
    log_decay = torch.complex(-torch.rand(H, N), torch.randn(H, N)).to(dtype)
    return torch.randn(2, L, H), log_decay, torch.randn(H, N, dtype=torch.complex64).to(dtype)


def scan(u):
    return ops.ssm_scan(u, *arguments()[1:], skip=torch.ones(H), return_state=True, backend="reference")


def step(u):
    log_decay, weight = arguments()[1:]
    state = torch.randn(2, H, N, dtype=torch.complex64)
    return ops.ssm_step(u[:, 0], log_decay.exp(), weight, state, skip=torch.ones(H), backend="reference")


def kernel(u):
    return (ops.ssm_kernel(*arguments()[1:], L, backend="reference"),)


def conv(u):
    return (ops.long_conv(u, torch.randn(H, L), backend="reference"),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", [scan, step, kernel, conv])
def test_autocast_changes_nothing(call, dtype):
    u = torch.randn(2, L, H).to(dtype)
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(call(u))
    for plain, cast in zip(*results, strict=True):
        assert cast.dtype == plain.dtype and torch.equal(cast, plain)


def test_autocast_leaves_the_gradients_of_the_convolution():
    u, taps, grad = torch.randn(2, L, H), torch.randn(H, L), torch.randn(2, L, H)
    results = []
    for enabled in (False, True):
        leaves = u.clone().requires_grad_(), taps.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = ops.long_conv(*leaves, backend="reference")
        results.append(torch.autograd.grad(y, leaves, grad))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(cast, plain)


def test_the_state_after_no_step_is_a_copy():
    u, log_decay, weight = arguments()
    state = torch.randn(2, H, N, dtype=torch.complex64)
    before = state.clone()
    options = {"initial_state": state, "return_state": True, "backend": "reference"}
    _, after = ops.ssm_scan(u[:, :0], log_decay, weight, **options)
    assert torch.equal(after, before)
    after.zero_()
    assert torch.equal(state, before)


def test_the_convolution_runs_where_there_is_no_autocast():
    u, taps = torch.empty(2, L, H, device="meta"), torch.empty(H, L, device="meta")
    assert ops.long_conv(u, taps, backend="reference").shape == (2, L, H)
