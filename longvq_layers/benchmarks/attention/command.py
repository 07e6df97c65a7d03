"""Attention over quantised keys on the CPU against fused scaled_dot_product_attention: time, memory, break-even length.

The assignment of keys to codes and the sums by code are part of our times. Inputs, peer and the check that ours is
right: `attention_cases.py`; operations counted: `attention_work.py`. Prints Markdown, writes results.csv and
attention.png.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from longvq_layers.benchmarks import assign, attention_cases, attention_decode, attention_memory, attention_report
from longvq_layers.benchmarks import results as common
from longvq_layers.benchmarks.attention_cases import FULL, QUICK, Calls, Form, Problem, Sizes
from longvq_layers.benchmarks.attention_report import Row
from longvq_layers.benchmarks.attention_work import PARTS, peer_flops, step_work, work
from longvq_layers.benchmarks.timing import interleaved_times
from longvq_layers.ops._dispatch import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("attention_benchmark"), metavar="DIR", help="%(default)s/")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what is measured, default %(default)s")
    parser.add_argument(
        "--budget", type=float, default=15.0, metavar="S", help="seconds of a method in a case, then 3 rounds do"
    )
    parser.add_argument(
        "--longest-call", type=float, default=30.0, metavar="S", help="the sweep leaves the peer out beyond it"
    )


def run(args: argparse.Namespace) -> None:
    if args.repeats < 1 or args.threads < 1:
        sys.exit("--repeats and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    sizes = QUICK if args.quick else FULL
    print(
        f"{common.machine(args.threads)}; ours is backend={args.backend!r}; float32, B = 1, {sizes.heads} heads of "
        f"{sizes.width}, S = {sizes.codes}; bidirectional: no window, causal: a window of {sizes.window} with a bias; "
        f"assignment included; medians of {args.repeats} interleaved rounds unless said otherwise.\n"
    )
    try:
        rows = list(_measure(args, sizes))
    except NotImplementedError as error:
        sys.exit(f"there is nothing to measure: {error}")
    attention_report.print_report(rows, sizes, judged=not args.quick)
    everywhere = {"B": 1, **{name: asdict(sizes)[name] for name in ("heads", "width", "codes", "window")}}
    common.write("attention", args.out, rows, **everywhere, threads=args.threads, torch=torch.__version__)


def _measure(args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    for form in sizes.forms:
        attention_cases.check(sizes, form, args.backend)
    for case in [case for case in CASES if case in args.cases]:
        print(f"{case} …", file=sys.stderr, flush=True)
        yield from CASES[case](args, sizes)


def _forward(args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    for form in sizes.forms:
        for length in sizes.forward:
            problem = Problem(sizes, form, length, args.backend)
            yield from _compare("forward", problem, problem.forward(), args, sizes)


def _backward(args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    for form in sizes.forms:
        problem = Problem(sizes, form, sizes.long, args.backend)
        yield from _compare("forward + backward", problem, problem.forward_and_backward(), args, sizes)


def _sweep(args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    """The lengths that "forward" has not measured, or all."""
    measured = sizes.forward if "forward" in args.cases else ()
    for form in sizes.forms:
        last = None  # length and seconds of the peer
        for length in [length for length in sizes.sweep if length not in measured]:
            problem = Problem(sizes, form, length, args.backend)
            calls, note = problem.forward(), ""
            # Quadratic; used to stop, never shown.
            if last is not None and last[1] * (length / last[0]) ** 2 > args.longest_call:
                del calls["sdpa"]
                note = f"left out, a call would take more than {args.longest_call:g} s"
            for row in _compare("forward", problem, calls, args, sizes):
                if row.method == "sdpa":
                    last = length, row.seconds
                yield row
            if note:
                yield Row("forward", form.name, length, "sdpa", note=note)


def _assign(args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    problem = Problem(sizes, Form("both", False, 0), sizes.long, args.backend)
    calls = assign.calls(problem.k, problem.codebook, args.backend)
    yield from _compare("assign", problem, calls, args, sizes)


def _bfloat16(args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    form, dtype = sizes.forms[0], torch.bfloat16
    try:
        attention_cases.check(sizes, form, args.backend, dtype)
    except NotImplementedError as error:  # a backend asked for by name
        yield Row("bfloat16", form.name, sizes.long, "ours", note=f"not measured, {error}")
        return
    half = Problem(sizes, form, sizes.long, args.backend, dtype)
    single = Problem(sizes, form, sizes.long, args.backend)
    calls = {"ours": half.forward()["ours"], "ours in float32": single.forward()["ours"]}
    yield from _compare("bfloat16", half, calls, args, sizes)


def _breakdown(args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    for form in sizes.forms:
        problem = Problem(sizes, form, sizes.long, args.backend)
        yield from _compare("parts", problem, problem.parts(), args, sizes)


def _memory(args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    for form in sizes.forms:
        for case in ("forward", "backward"):
            extra = attention_memory.extra_bytes(case, sizes, form, args.backend, args.threads)
            yield Row(f"memory of {case}", form.name, sizes.long, "ours", extra_bytes=extra)


@torch.inference_mode()
def _decode(args: argparse.Namespace, sizes: Sizes) -> list[Row]:
    calls, cache_bytes = attention_decode.calls(sizes, args.backend)
    flops, moved = step_work(sizes)
    rows = []
    for name, values in interleaved_times(calls, args.repeats, args.budget).items():
        peer = name == "sdpa"
        seconds = statistics.median(values) / (1 if peer else sizes.tokens)
        gflops, gbytes = (None, cache_bytes / seconds / 1e9) if peer else (flops / seconds / 1e9, moved / seconds / 1e9)
        length = sizes.cache if peer else int(name.removeprefix("after "))
        method = "sdpa" if peer else "ours"
        served = "torch" if peer else attention_cases.served_by("vq_attention_step", args.backend, torch.float32)
        rows.append(Row("decode", "causal", length, method, seconds, len(values), gflops, gbytes, served=served))
    return rows


CASES: dict[str, Callable[[argparse.Namespace, Sizes], Iterator[Row] | list[Row]]] = {
    "forward": _forward,
    "sweep": _sweep,
    "backward": _backward,
    "assign": _assign,
    "bfloat16": _bfloat16,
    "decode": _decode,
    "breakdown": _breakdown,
    "memory": _memory,
}


def _compare(case: str, problem: Problem, calls: Calls, args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    """Rows of the calls and, measured in the same rounds, of what the machine can do."""
    form, length = problem.form, problem.q.shape[2]
    limits = attention_cases.ceilings(sizes, problem.q)
    with torch.set_grad_enabled(case in ("forward + backward", "parts")):
        times = interleaved_times({**calls, **limits}, args.repeats, args.budget)
    limit_work = attention_cases.ceiling_work(sizes, problem.q)
    for method, values in times.items():
        seconds, rounds = statistics.median(values), len(values)
        flops, moved = limit_work[method] if method in limits else _useful(case, method, sizes, form, length)
        yield Row(
            case,
            form.name,
            length,
            method,
            seconds,
            rounds,
            flops and flops / seconds / 1e9,
            moved and moved / seconds / 1e9,
            served="" if method in limits else _served(case, method, problem),
            note="" if rounds == args.repeats else f"{rounds} rounds, {args.budget:g} s were up",
        )


def _useful(case: str, method: str, sizes: Sizes, form: Form, length: int) -> tuple[float | None, float | None]:
    if method == "sdpa":
        return peer_flops(case, sizes, form, length), None
    if case == "parts":
        return work((method,), sizes, form, length)
    if case == "bfloat16":
        flops, moved = work(PARTS["forward"], sizes, form, length)
        return flops, moved / 2 if method == "ours" else moved
    return work(PARTS[case], sizes, form, length)


def _served(case: str, method: str, problem: Problem) -> str:
    """The backend; the peers are torch."""
    dtype = torch.float32 if method == "ours in float32" else problem.q.dtype
    if method in ("sdpa", "matmul + argmax"):
        return "torch"
    if case == "assign" or method == "assignment":
        return attention_cases.served_by("vq_assign", problem.backend, dtype)
    if case == "forward + backward" or method == "backward":
        return attention_cases.backward_served_by(problem.backend, dtype)
    return attention_cases.served_by("vq_attention", problem.backend, dtype)
