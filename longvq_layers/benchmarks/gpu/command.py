"""One run on a GPU: build, check and time the CUDA kernels, and write one report.

    python -m longvq_layers.benchmarks gpu --out DIR

Needs torch with CUDA. With the sources and nvcc the kernels are built first, otherwise those of the package are used.
Needs no network and no other package. With pytest and hypothesis the tests of the kernels run on the GPU as well, and
with compute-sanitizer its memcheck and racecheck. A part that fails is reported, and the run continues.
"""

import argparse
import sys
from collections.abc import Iterable
from functools import partial

import torch

from longvq_layers.benchmarks.common import arguments
from longvq_layers.benchmarks.gpu import build, checks, layers, times
from longvq_layers.benchmarks.gpu.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_out(parser, "gpu_benchmark")
    parser.add_argument("--budget", type=float, default=420.0, metavar="S", help="seconds in all, default %(default)s")
    parser.add_argument("--checks-only", action="store_true", help="the checks alone, as the sanitizers run them")
    arguments.add_quick(parser)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # "cpu": for the tests of this benchmark


def run(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU that this torch can use")
    report = Report(args.out, args.budget)
    if args.checks_only:
        report.part("checks", lambda: [checks.run(args.device, count=12)])
        report.finish()
        return
    report.part("machine", lambda: [_machine(args.device)])
    report.part("build", lambda: [build.build() if args.device == "cuda" else "not built: a run on the CPU"])
    report.part(
        "checks against the PyTorch backend in float64",
        lambda: [checks.run(args.device, count=4 if args.quick else 60)],
    )
    report.part("layers against the CPU in float64", lambda: [layers.check(args.device)])
    for title, part in times.PARTS.items():
        report.part(title, partial(part, args.device, args.quick))
    if args.device == "cuda":
        report.part("tests", lambda: [build.tests()])
        for tool in ("memcheck", "racecheck"):
            report.part(f"compute-sanitizer {tool}", partial(_sanitizer_lines, tool, args))
    report.finish()


def _sanitizer_lines(tool: str, args: argparse.Namespace) -> Iterable[str]:
    return [build.sanitize(tool, args.out)]


def _machine(device: str) -> str:
    if device == "cpu":
        return f"torch {torch.__version__}, on the CPU"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} "
        f"multiprocessors, {properties.total_memory / 2**30:.0f} GiB; torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}"
    )
