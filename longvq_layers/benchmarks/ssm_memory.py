"""Memory of the scan, in a process of its own: `python -m longvq_layers.benchmarks.ssm_memory` is the child.

The peak is that of resident memory during forward and backward, above a baseline that holds u, the gradient of y and
the parameters; y and the gradients count. How it is read: `memory.py`.
"""

import json
import sys

from longvq_layers.benchmarks.memory import in_own_process, peak_of


def peak_of_backward(batch: int, channels: int, length: int, backend: str, threads: int) -> int | None:
    """Extra bytes at the peak of forward + backward; None where memory can't be read.

    Raises:
        RuntimeError: the measuring process failed.
    """
    return in_own_process(__name__, [batch, channels, length, backend, threads])


def _child(batch: int, channels: int, length: int, backend: str, threads: int) -> int | None:
    import torch

    from longvq_layers import ops
    from longvq_layers.benchmarks.ssm_peers import D_STATE
    from longvq_layers.layers.ssm.diagonal import DiagonalSSM

    torch.set_num_threads(threads)
    with torch.no_grad():
        log_decay, weight, skip = DiagonalSSM(channels, d_state=D_STATE, causal=True).discrete()
    parameters = [x.clone().requires_grad_() for x in (log_decay, weight[0], skip)]

    def inputs(steps: int):
        return torch.randn(batch, steps, channels).requires_grad_(), torch.randn(batch, steps, channels)

    def forward_and_backward(u, grad_y):
        y = ops.ssm_scan(u, *parameters[:2], skip=parameters[2], backend=backend)
        return y, torch.autograd.grad(y, [u, *parameters], grad_y)

    forward_and_backward(*inputs(min(length, 128)))  # threads, kernels and caches of the first call
    u, grad_y = inputs(length)
    return peak_of(lambda: forward_and_backward(u, grad_y))


if __name__ == "__main__":
    print(json.dumps(_child(*json.loads(sys.argv[1]))))
