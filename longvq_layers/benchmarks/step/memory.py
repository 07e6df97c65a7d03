"""Memory of a training step, in a process of its own: `python -m longvq_layers.benchmarks.step_memory` is the child.

The peak is that of resident memory during forward and backward of the second step, above what the process held before
its first: the saved activations, the parameters' gradients and everything temporary count, parameters and the state of
the optimiser don't. How it is read: `memory.py`.
"""

import json
import sys

from longvq_layers.benchmarks.memory import in_own_process, peak_of


def peak_of_step(name: str, sizes: tuple, length: int, threads: int) -> int | None:
    """Extra bytes at the peak; None where memory can't be read.

    Args:
        name: of the model in `step.MODELS`.
        sizes: d_model, depth, codes, window, as `step.build` takes them.
        length: of the sequence.
        threads: of PyTorch.

    Raises:
        RuntimeError: the measuring process failed.
    """
    return in_own_process(__name__, [name, list(sizes), length, threads])


def _child(name: str, sizes: list, length: int, threads: int) -> int | None:
    import torch

    from longvq_layers.benchmarks import step
    from longvq_layers.layers import commitment_loss

    torch.set_num_threads(threads)
    model = step.build(name, *sizes).train()

    def forward_and_backward(inputs: torch.Tensor) -> None:
        model.zero_grad()
        target = torch.zeros(1, dtype=torch.int64)
        (torch.nn.functional.cross_entropy(model(inputs), target) + commitment_loss(model)).backward()
        model.zero_grad()

    # Threads, kernels and caches of the first call, and a codebook that has started.
    forward_and_backward(torch.randint(256, (1, min(length, 512))))
    inputs = torch.randint(256, (1, length))
    return peak_of(lambda: forward_and_backward(inputs))


if __name__ == "__main__":
    print(json.dumps(_child(*json.loads(sys.argv[1]))))
