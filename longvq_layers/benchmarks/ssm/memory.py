"""Memory of the scan, in a process of its own: `python -m longvq_layers.benchmarks.ssm.memory` is the child.

The peak of resident memory during forward and backward counts, above a baseline with u, the gradient of y and the
parameters. So y and the gradients are part of it. `common/memory.py` reads the memory.
"""

import torch
from torch import Tensor

from longvq_layers import ops
from longvq_layers.benchmarks.common.child_process import answer
from longvq_layers.benchmarks.common.memory import peak_in_child, peak_of
from longvq_layers.benchmarks.ssm.peers import D_STATE
from longvq_layers.layers.ssm.diagonal import DiagonalSSM


def peak_of_backward(batch: int, channels: int, length: int, backend: str, threads: int) -> int | None:
    """Extra bytes at the peak of forward + backward; None where memory can't be read.

    Raises:
        RuntimeError: the measuring process failed.
    """
    return peak_in_child(__name__, [batch, channels, length, backend, threads])


def _measure(batch: int, channels: int, length: int, backend: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    with torch.no_grad():
        log_decay, weight, skip = DiagonalSSM(channels, d_state=D_STATE, causal=True).discrete()
    log_decay, weight, skip = parameters = [x.clone().requires_grad_() for x in (log_decay, weight[0], skip)]

    def inputs(steps: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, steps, channels).requires_grad_(), torch.randn(batch, steps, channels)

    def forward_and_backward(u: Tensor, grad_y: Tensor) -> object:
        y = ops.ssm_scan(u, log_decay, weight, skip=skip, backend=backend)
        return y, torch.autograd.grad(y, [u, *parameters], grad_y)

    forward_and_backward(*inputs(min(length, 128)))  # the first call makes threads, kernels and caches
    u, grad_y = inputs(length)
    return peak_of(lambda: forward_and_backward(u, grad_y))


if __name__ == "__main__":
    answer(_measure)
