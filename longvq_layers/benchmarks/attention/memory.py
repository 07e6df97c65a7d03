"""Memory of attention, in a process of its own: `python -m longvq_layers.benchmarks.attention_memory` is the child.

The baseline holds everything that the caller has: q, k, v, codebook and bias; for backward, which is measured alone,
also out, its gradient and all that forward saved. The results, out or the gradients of q, k, v and bias, are subtracted
from the peak, so what is left is what the method needs for itself: codes, log-sum-exp, sums by code, scratch space.
How it is read: `memory.py`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

from longvq_layers.benchmarks.attention_cases import Form, Problem, Sizes
from longvq_layers.benchmarks.memory import in_own_process, peak_of


def extra_bytes(case: str, sizes: Sizes, form: Form, backend: str, threads: int) -> int | None:
    """Extra bytes at the peak of "forward" or "backward"; None where memory can't be read.

    Raises:
        RuntimeError: the measuring process failed.
    """
    return in_own_process(__name__, [case, asdict(sizes), asdict(form), backend, threads])


def beyond_results(call: Callable[[], object], result_bytes: int) -> int | None:
    peak = peak_of(call)
    return None if peak is None else max(peak - result_bytes, 0)


def _child(case: str, sizes: dict, form: dict, backend: str, threads: int) -> int | None:
    import torch

    torch.set_num_threads(threads)
    sizes, form = Sizes(**sizes), Form(**form)
    # Threads, kernels and caches of the first call.
    torch.autograd.grad(*_graph(Problem(sizes, form, min(sizes.long, 256), backend)))
    problem = Problem(sizes, form, sizes.long, backend)
    if case == "forward":
        with torch.no_grad():
            return beyond_results(problem.forward()["ours"], problem.v.nbytes)
    out, leaves, grad = _graph(problem)
    return beyond_results(lambda: torch.autograd.grad(out, leaves, grad), sum(x.nbytes for x in leaves))


def _graph(problem: Problem) -> tuple:
    leaves = problem.leaves()
    return problem.ours(*leaves), leaves, problem.grad


if __name__ == "__main__":
    print(json.dumps(_child(*json.loads(sys.argv[1]))))
