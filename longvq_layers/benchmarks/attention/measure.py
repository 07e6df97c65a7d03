"""The cases of the benchmark of attention: each gives rows."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import nan

import torch

from longvq_layers.benchmarks import assign
from longvq_layers.benchmarks.attention import checks, decode, memory
from longvq_layers.benchmarks.attention.problem import Form, Problem, Sizes
from longvq_layers.benchmarks.attention.rows import Row
from longvq_layers.benchmarks.attention.work import PARTS, Work, limits, peer_flops, step_work, work, work_of_limits
from longvq_layers.benchmarks.common.results import say
from longvq_layers.benchmarks.common.timing import Calls, interleaved_times, note_of_rounds
from longvq_layers.ops._dispatch import choose


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    sizes: Sizes
    backend: str
    threads: int
    repeats: int
    budget: float  # seconds of a method in a case; a slower one is timed in three rounds
    longest_call: float  # seconds; the sweep leaves the peer out where a call would take longer
    cases: list[str]


def measure(run: Run) -> Iterator[Row]:
    """Check both forms, then measure every case."""
    for form in run.sizes.forms:
        checks.check(run.sizes, form, run.backend)
    for case in [case for case in CASES if case in run.cases]:
        say(f"{case} …")
        yield from CASES[case](run)


def _forward(run: Run) -> Iterator[Row]:
    for form in run.sizes.forms:
        for length in run.sizes.forward:
            problem = Problem(run.sizes, form, length, run.backend)
            yield from _compare("forward", problem, problem.forward(), run)


def _backward(run: Run) -> Iterator[Row]:
    for form in run.sizes.forms:
        problem = Problem(run.sizes, form, run.sizes.long, run.backend)
        yield from _compare("forward + backward", problem, problem.forward_and_backward(), run)


def _sweep(run: Run) -> Iterator[Row]:
    """Forward at the lengths that the case "forward" does not measure."""
    measured = run.sizes.forward if "forward" in run.cases else ()
    for form in run.sizes.forms:
        last = None  # length and seconds of the peer
        for length in [length for length in run.sizes.sweep if length not in measured]:
            problem = Problem(run.sizes, form, length, run.backend)
            calls, note = problem.forward(), ""
            # The time of the peer is quadratic; this estimate decides whether to stop, and is never shown.
            if last is not None and last[1] * (length / last[0]) ** 2 > run.longest_call:
                del calls["sdpa"]
                note = f"left out, a call would take more than {run.longest_call:g} s"
            for row in _compare("forward", problem, calls, run):
                if row.method == "sdpa":
                    last = length, row.seconds
                yield row
            if note:
                yield Row("forward", form.name, length, "sdpa", note=note)


def _assign(run: Run) -> Iterator[Row]:
    problem = Problem(run.sizes, Form("both", False, 0), run.sizes.long, run.backend)
    calls = assign.calls(problem.k, problem.codebook, run.backend)
    yield from _compare("assign", problem, calls, run)


def _bfloat16(run: Run) -> Iterator[Row]:
    sizes, form, dtype = run.sizes, run.sizes.forms[0], torch.bfloat16
    try:
        checks.check(sizes, form, run.backend, dtype)
    except NotImplementedError as error:  # the backend of --backend has no bfloat16
        yield Row("bfloat16", form.name, sizes.long, "ours", note=f"not measured, {error}")
        return
    half = Problem(sizes, form, sizes.long, run.backend, dtype)
    single = Problem(sizes, form, sizes.long, run.backend)
    calls = {"ours": half.forward()["ours"], "ours in float32": single.forward()["ours"]}
    yield from _compare("bfloat16", half, calls, run)


def _breakdown(run: Run) -> Iterator[Row]:
    for form in run.sizes.forms:
        problem = Problem(run.sizes, form, run.sizes.long, run.backend)
        yield from _compare("parts", problem, problem.parts(), run)


def _memory(run: Run) -> Iterator[Row]:
    for form in run.sizes.forms:
        for case in ("forward", "backward"):
            extra = memory.extra_bytes(case, run.sizes, form, run.backend, run.threads)
            yield Row(f"memory of {case}", form.name, run.sizes.long, "ours", extra_bytes=extra)


@torch.inference_mode()
def _decode(run: Run) -> list[Row]:
    calls, cache_bytes = decode.calls(run.sizes, run.backend)
    flops, moved = step_work(run.sizes)
    rows = []
    for name, values in interleaved_times(calls, run.repeats, run.budget).items():
        median, rounds = statistics.median(values), len(values)
        if name == "sdpa":
            rate = cache_bytes / median / 1e9
            rows.append(Row("decode", "causal", run.sizes.cache, "sdpa", median, rounds, gbytes=rate, served="torch"))
        else:
            seconds, length = median / run.sizes.tokens, int(name.removeprefix("after "))
            rates = flops / seconds / 1e9, moved / seconds / 1e9
            served = _backend_of("vq_attention_step", run.backend, torch.float32)
            rows.append(Row("decode", "causal", length, "ours", seconds, rounds, *rates, served=served))
    return rows


CASES: dict[str, Callable[[Run], Iterable[Row]]] = {
    "forward": _forward,
    "sweep": _sweep,
    "backward": _backward,
    "assign": _assign,
    "bfloat16": _bfloat16,
    "decode": _decode,
    "breakdown": _breakdown,
    "memory": _memory,
}


def _compare(case: str, problem: Problem, calls: Calls, run: Run) -> Iterator[Row]:
    """Rows of the calls and, timed in the same rounds, of the machine's limits."""
    form, length = problem.form, problem.q.shape[2]
    machine = limits(run.sizes, problem.q)
    with torch.set_grad_enabled(case in ("forward + backward", "parts")):
        times = interleaved_times({**calls, **machine}, run.repeats, run.budget)
    work_of_machine = work_of_limits(run.sizes, problem.q)
    for method, values in times.items():
        seconds, rounds = statistics.median(values), len(values)
        flops, moved = work_of_machine.get(method) or _useful(case, method, run.sizes, form, length)
        yield Row(
            case,
            form.name,
            length,
            method,
            seconds,
            rounds,
            flops / seconds / 1e9,
            moved / seconds / 1e9,
            served="" if method in machine else _served(case, method, problem),
            note=note_of_rounds(rounds, run.repeats, run.budget),
        )


def _useful(case: str, method: str, sizes: Sizes, form: Form, length: int) -> Work:
    if method == "sdpa":
        return peer_flops(case, sizes, form, length), nan
    if case == "parts":
        return work((method,), sizes, form, length)
    if case == "bfloat16":
        flops, moved = work(PARTS["forward"], sizes, form, length)
        return flops, moved / 2 if method == "ours" else moved
    return work(PARTS[case], sizes, form, length)


def _served(case: str, method: str, problem: Problem) -> str:
    """The backend that computes a method; the peers are PyTorch's."""
    dtype = torch.float32 if method == "ours in float32" else problem.q.dtype
    if method in ("sdpa", "matmul + argmax"):
        return "torch"
    if case == "assign" or method == "assignment":
        return _backend_of("vq_assign", problem.backend, dtype)
    if case == "forward + backward" or method == "backward":
        return _backend_of_backward(problem.backend, dtype)
    return _backend_of("vq_attention", problem.backend, dtype)


def _backend_of(op: str, backend: str, dtype: torch.dtype) -> str:
    return choose(op, backend, torch.device("cpu"), (dtype,))


def _backend_of_backward(backend: str, dtype: torch.dtype) -> str:
    """The backend of forward + backward: backward is PyTorch's where the compiled library has no kernel for it."""
    served = _backend_of("vq_attention", backend, dtype)
    native = torch._C._dispatch_has_kernel_for_dispatch_key("longvq::vq_attention_backward", "CPU")
    return "native, backward torch" if served == "native" and not native else served
