"""Times and memory of calls on a GPU, by CUDA events, and tables of methods against their peers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from longvq_layers.benchmarks.common.timing import interleaved_medians, seconds_of

_ROUNDS = 7
_WARM_UP = 2  # rounds


class Method(NamedTuple):
    """A differentiable function and its inputs."""

    call: Callable[..., Tensor]
    inputs: Sequence[Tensor]


def medians(device: str, calls: Mapping[str, Callable[[], object]], rounds: int = _ROUNDS) -> dict[str, float]:
    """Median seconds of each call in interleaved rounds, after the warm-up."""
    return interleaved_medians(calls, rounds, warm_up=_WARM_UP, measure=partial(_seconds, device))


def _seconds(device: str, call: Callable[[], object]) -> float:
    if device == "cpu":
        return seconds_of(call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_memory(device: str, call: Callable[[], object]) -> float:
    """Bytes at the peak of a call, above those before it; 0 on the CPU."""
    if device == "cpu":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def table(
    device: str, methods: Mapping[str, Method], peers: Sequence[str], describe: Callable[[float], str]
) -> Iterator[str]:
    """Times of forward, and of forward with backward, against the fastest peer. A method that fails gets a line too.

    Args:
        device: of the inputs.
        methods: name -> method.
        peers: names of those that are not ours.
        describe: seconds of our forward -> text of the last column.
    """
    yield "| method | pass | ms | against the peer | |\n|:---|:---|---:|---:|:---|"
    for backward in (False, True):
        calls: dict[str, Callable[[], object]] = {}
        failed: dict[str, Exception] = {}
        for name, method in methods.items():
            run = _training(method) if backward else _inference(method)
            try:
                run()
                calls[name] = run
            except Exception as error:  # a peer that this GPU or torch doesn't have, a kernel that doesn't run
                failed[name] = error
        with torch.set_grad_enabled(backward):
            seconds = medians(device, calls)
        best = min((seconds[name] for name in peers if name in seconds), default=float("nan"))
        what = "forward + backward" if backward else "forward"
        for name in methods:
            if name in failed:
                yield f"| {name} | {what} | failed: {type(failed[name]).__name__}: {str(failed[name])[:200]} | | |"
                continue
            note = describe(seconds[name]) if not backward and name not in peers else ""
            yield f"| {name} | {what} | {seconds[name] * 1e3:.3f} | {best / seconds[name]:.2f}x | {note} |"


def _inference(method: Method) -> Callable[[], object]:
    return lambda: method.call(*method.inputs)


def _training(method: Method) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in method.inputs]
    grad: Tensor | None = None

    def run() -> object:
        nonlocal grad
        out = method.call(*leaves)
        grad = torch.ones_like(out) if grad is None else grad
        return torch.autograd.grad(out, leaves, grad)

    return run
