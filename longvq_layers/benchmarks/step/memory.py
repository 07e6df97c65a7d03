"""Memory of a training step, in a process of its own: `python -m longvq_layers.benchmarks.step.memory` is the child.

The peak of resident memory during the second forward and backward counts, above what the process holds after the first
one. So saved activations, gradients of the parameters and everything temporary are part of it. Parameters are not, and
no optimiser takes a step. `common/memory.py` reads the memory.
"""

import torch
from torch import Tensor

from longvq_layers.benchmarks.common.child_process import answer
from longvq_layers.benchmarks.common.memory import peak_in_child, peak_of
from longvq_layers.benchmarks.step.models import Sizes, build
from longvq_layers.layers import commitment_loss


def peak_of_step(name: str, sizes: Sizes, length: int, threads: int) -> int | None:
    """Extra bytes at the peak; None where memory can't be read.

    Args:
        name: of the model in `MODELS`.
        sizes: of the model.
        length: of the sequence.
        threads: of PyTorch.

    Raises:
        RuntimeError: the measuring process failed.
    """
    return peak_in_child(__name__, [name, list(sizes), length, threads])


def _measure(name: str, sizes: list[int], length: int, threads: int) -> int | None:
    torch.set_num_threads(threads)
    model = build(name, Sizes(*sizes)).train()

    def forward_and_backward(inputs: Tensor) -> None:
        model.zero_grad()
        target = torch.zeros(1, dtype=torch.int64)
        (torch.nn.functional.cross_entropy(model(inputs), target) + commitment_loss(model)).backward()
        model.zero_grad()

    # The first call makes threads, kernels and caches, and starts the codebook.
    forward_and_backward(torch.randint(256, (1, min(length, 512))))
    inputs = torch.randint(256, (1, length))
    return peak_of(lambda: forward_and_backward(inputs))


if __name__ == "__main__":
    answer(_measure)
