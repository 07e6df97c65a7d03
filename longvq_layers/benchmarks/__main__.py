"""Run one benchmark: `python -m longvq_layers.benchmarks NAME [--threads 2 …]`."""

import argparse
from typing import Protocol

from longvq_layers.benchmarks import assign, generation
from longvq_layers.benchmarks.architectures import command as architectures
from longvq_layers.benchmarks.attention import command as attention
from longvq_layers.benchmarks.gpu import command as gpu
from longvq_layers.benchmarks.llama import command as llama
from longvq_layers.benchmarks.quality import command as quality
from longvq_layers.benchmarks.ssm import command as ssm
from longvq_layers.benchmarks.step import command as step


class Benchmark(Protocol):
    """The module of a benchmark; the first line of its docstring is the help text."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this benchmark."""

    def run(self, args: argparse.Namespace) -> None:
        """Measure, print and write the results."""


BENCHMARKS: dict[str, Benchmark] = {
    "architectures": architectures,
    "assign": assign,
    "attention": attention,
    "generation": generation,
    "gpu": gpu,
    "llama": llama,
    "quality": quality,
    "ssm": ssm,
    "step": step,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longvq_layers.benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        module.add_arguments(commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    args = parser.parse_args()
    BENCHMARKS[args.benchmark].run(args)


if __name__ == "__main__":
    main()
