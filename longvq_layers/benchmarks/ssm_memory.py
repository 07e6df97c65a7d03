"""Memory of the scan, in a process of its own: `python -m longvq_layers.benchmarks.ssm_memory` is the child.

The peak is that of resident memory during forward and backward, above a baseline that holds u, the gradient of y and
the parameters; y and the gradients count. How it is read: `longvq_layers/demo/memory.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from longvq_layers.demo.memory import peak_of

# Every larger buffer is mapped by itself, so that freed memory leaves the process at once. glibc; ignored elsewhere.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_of_backward(batch: int, channels: int, length: int, backend: str, threads: int) -> int | None:
    """Extra bytes at the peak of forward + backward; None where memory can't be read.

    Raises:
        RuntimeError: the measuring process failed.
    """
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps([batch, channels, length, backend, threads])],
        env={**os.environ, **_ALLOCATOR, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def resident() -> int | None:
    """Bytes of resident memory of this process now; None where `/proc` doesn't tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else None


def _child(batch: int, channels: int, length: int, backend: str, threads: int) -> int | None:
    import torch

    from longvq_layers import ops
    from longvq_layers.benchmarks.ssm_peers import D_STATE
    from longvq_layers.layers.ssm import DiagonalSSM

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
