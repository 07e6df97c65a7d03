"""Memory of attention, in a process of its own: `python -m longvq_layers.benchmarks.attention.memory` is the child.

The baseline holds everything that the caller has: q, k, v, codebook and bias. Backward is measured alone; its baseline
also holds out, the gradient of out and all that forward saved. The results (out, or the gradients of q, k, v and bias)
are subtracted from the peak. What remains is what the method itself needs: codes, normalizers, sums by code, scratch
space. `common/memory.py` reads the memory.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from longvq_layers.benchmarks.attention.problem import Form, Problem, Sizes
from longvq_layers.benchmarks.common.child_process import answer
from longvq_layers.benchmarks.common.memory import peak_in_child, peak_of


def extra_bytes(case: str, sizes: Sizes, form: Form, backend: str, threads: int) -> int | None:
    """Extra bytes at the peak of "forward" or "backward"; None where memory can't be read.

    Raises:
        RuntimeError: the measuring process failed.
    """
    return peak_in_child(__name__, [case, asdict(sizes), asdict(form), backend, threads])


def beyond_results(call: Callable[[], object], result_bytes: int) -> int | None:
    """The peak of a call without its results."""
    peak = peak_of(call)
    return None if peak is None else max(peak - result_bytes, 0)


def _measure(case: str, sizes: dict[str, Any], form: dict[str, Any], backend: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    return _extra_bytes(case, Sizes(**sizes), Form(**form), backend)


def _extra_bytes(case: str, sizes: Sizes, form: Form, backend: str) -> int | None:
    # The first call makes threads, kernels and caches.
    torch.autograd.grad(*_graph(Problem(sizes, form, min(sizes.long, 256), backend)))
    problem = Problem(sizes, form, sizes.long, backend)
    if case == "forward":
        with torch.no_grad():
            return beyond_results(problem.forward()["ours"], problem.v.nbytes)
    out, leaves, grad = _graph(problem)
    return beyond_results(lambda: torch.autograd.grad(out, leaves, grad), sum(x.nbytes for x in leaves))


def _graph(problem: Problem) -> tuple[Tensor, list[Tensor], Tensor]:
    leaves = problem.leaves()
    return problem.ours(*leaves), leaves, problem.grad


if __name__ == "__main__":
    answer(_measure)
