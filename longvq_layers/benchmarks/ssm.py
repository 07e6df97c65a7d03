"""Diagonal state space scan on the CPU: time and memory of forward, backward and step against other ways to compute it.

Float32, 64 real (32 complex) state dimensions a channel. The peers and their layouts: `ssm_peers.py`. Every peer is
checked to give the same result before anything is timed. Prints Markdown, writes results.csv and ssm.png.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from longvq_layers import ops
from longvq_layers.benchmarks import memory, results, ssm_memory, ssm_report
from longvq_layers.benchmarks.ssm_peers import D_STATE, Problem
from longvq_layers.benchmarks.ssm_report import Row, work
from longvq_layers.benchmarks.timing import interleaved_times
from longvq_layers.layers.ssm.diagonal import DiagonalSSM
from longvq_layers.ops._dispatch import BACKENDS

_BUDGET = 15.0  # seconds of one method in one case; beyond it the method takes part in three rounds only
_STEP_WARM_UP = 100  # tokens


@dataclass(frozen=True)
class Sizes:
    channels: int = 256
    forward: tuple[tuple[int, int], ...] = ((1, 4096), (1, 16384))  # (B, L)
    backward: tuple[tuple[int, int], ...] = ((4, 4096),)
    memory: tuple[tuple[int, int], ...] = ((4, 4096), (4, 16384))
    scaling: tuple[int, ...] = tuple(4**power for power in range(5, 11))  # 1,024 … 1,048,576
    step_channels: int = 1024
    step_tokens: int = 5_000
    growth_tokens: int = 10_000
    matmul: int = 2048


FULL = Sizes()
QUICK = Sizes(16, ((1, 64), (1, 256)), ((2, 64),), ((2, 4096),), (64, 256, 1024), 16, 50, 200, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    parser.add_argument("--repeats", type=int, default=9, help="rounds, default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("ssm_benchmark"), metavar="DIR", help="default %(default)s/")
    parser.add_argument("--backend", choices=BACKENDS, default="native", help="what is measured, default %(default)s")
    parser.add_argument(
        "--max-length", type=int, default=None, metavar="L", help="no longer sequence (1,048,576 steps take 2 GiB)"
    )


def run(args: argparse.Namespace) -> None:
    if args.repeats < 1 or args.threads < 1:
        sys.exit("--repeats and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    try:
        _try_backend(args.backend)
    except NotImplementedError as error:
        sys.exit(f"there is nothing to measure: {error}")
    sizes = QUICK if args.quick else FULL
    print(
        f"{results.machine(args.threads)}; ours is backend={args.backend!r}; float32, d_state = {D_STATE}, "
        f"medians of {args.repeats} interleaved rounds unless said otherwise.\n"
    )
    rows = list(_measure(args, sizes))
    ssm_report.print_report(rows, judged=not args.quick)
    results.write("ssm", args.out, rows, backend=args.backend, threads=args.threads, torch=torch.__version__)


def _try_backend(backend: str) -> None:
    """Raises NotImplementedError if a call that will be measured is not served."""
    ssm = DiagonalSSM(2, d_state=D_STATE, causal=True, backend=backend)
    ssm(torch.zeros(1, 2, 2)).sum().backward()
    with torch.no_grad():
        ssm.step(torch.zeros(1, 2), ssm.initial_state(1))


def _measure(args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    longest = args.max_length or float("inf")
    for case, pairs in (("forward", sizes.forward), ("forward + backward", sizes.backward)):
        for batch, length in pairs:
            if length <= longest:
                _say(f"{case}, B = {batch}, L = {length} …")
                yield from _compare(case, batch, sizes.channels, length, args, sizes.matmul)
    _say("step …")
    yield from _step(sizes, args.backend)
    lengths = [length for length in sizes.scaling if length <= longest]
    if lengths:
        _say(f"forward at L = {lengths[0]} to {lengths[-1]} …")
        yield from _scaling(lengths, sizes.channels, args.backend, args.repeats)
    for batch, length in sizes.memory:
        if length <= longest:
            _say(f"memory, L = {length} …")
            peak = ssm_memory.peak_of_backward(batch, sizes.channels, length, args.backend, args.threads)
            yield Row("memory", batch, sizes.channels, length, "ours", extra_bytes=peak)


def _compare(
    case: str, batch: int, channels: int, length: int, args: argparse.Namespace, matmul_size: int
) -> Iterator[Row]:
    problem = Problem(batch, channels, length, args.backend)
    calls, skipped = problem.peers(case)
    square = torch.randn(matmul_size, matmul_size)
    with torch.set_grad_enabled(case != "forward"):
        differences = problem.differences(calls, case)
        times = interleaved_times({**calls, "matmul": lambda: square @ square}, args.repeats, _BUDGET)
    flops, moved = work(case, batch, channels, length)
    for name, values in times.items():
        seconds, rounds = statistics.median(values), len(values)
        gflops, gbytes = flops / seconds / 1e9, moved / seconds / 1e9
        if name == "matmul":
            gflops, gbytes = 2 * matmul_size**3 / seconds / 1e9, None
        elif name in ("copy", "clone"):
            gflops, gbytes = None, 8 * batch * channels * length / seconds / 1e9
        note = "" if rounds == args.repeats else f"{rounds} rounds, {_BUDGET:g} s were up"
        yield Row(
            case, batch, channels, length, name, seconds, rounds, gflops, gbytes, differences.get(name), None, note
        )
    for name, reason in skipped.items():
        yield Row(case, batch, channels, length, name, note=f"skipped, {reason}")


def _step(sizes: Sizes, backend: str) -> list[Row]:
    torch.manual_seed(0)
    ssm = DiagonalSSM(sizes.step_channels, d_state=D_STATE, causal=True, backend=backend).eval()
    # As one generates; under no_grad every call would go through autograd's layer for nothing.
    with torch.inference_mode():
        return list(_time_steps(ssm, sizes))


def _time_steps(ssm: DiagonalSSM, sizes: Sizes) -> Iterator[Row]:
    channels = sizes.step_channels
    state, tokens = ssm.initial_state(1), torch.randn(64, 1, channels)
    times = []
    for i in range(_STEP_WARM_UP + sizes.step_tokens):
        u = tokens[i % len(tokens)]
        start = time.perf_counter()
        _, state = ssm.step(u, state)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[_STEP_WARM_UP:])
    flops, moved = work("step", 1, channels, 1)
    rates = flops / seconds / 1e9, moved / seconds / 1e9
    yield Row("step", 1, channels, 1, "ours", seconds, sizes.step_tokens, *rates)

    before = memory.resident()
    for i in range(sizes.growth_tokens):
        _, state = ssm.step(tokens[i % len(tokens)], state)
    after = memory.resident()
    growth = None if before is None or after is None else after - before
    yield Row("step memory", 1, channels, sizes.growth_tokens, "ours", extra_bytes=growth)


@torch.no_grad()
def _scaling(lengths: list[int], channels: int, backend: str, repeats: int) -> Iterator[Row]:
    """Ours alone: all lengths are the start of one input."""
    torch.manual_seed(0)
    log_decay, weight, skip = DiagonalSSM(channels, d_state=D_STATE, causal=True).discrete()
    longest = torch.randn(1, lengths[-1], channels)
    # Short ones run several times a round: one call of the shortest is as long as a hiccup of the machine.
    calls = {length: max(1, min(lengths[-1], 16384) // length) for length in lengths}

    def scan(length: int):
        u = longest[:, :length]
        for _ in range(calls[length]):
            ops.ssm_scan(u, log_decay, weight[0], skip=skip, backend=backend)

    candidates = {str(length): lambda length=length: scan(length) for length in lengths}
    for name, values in interleaved_times(candidates, repeats, _BUDGET).items():
        length, rounds = int(name), len(values)
        seconds = statistics.median(values) / calls[length]
        flops, moved = work("scaling", 1, channels, length)
        note = "" if rounds == repeats else f"{rounds} rounds, {_BUDGET:g} s were up"
        rates = flops / seconds / 1e9, moved / seconds / 1e9
        yield Row("scaling", 1, channels, length, "ours", seconds, rounds, *rates, note=note)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
