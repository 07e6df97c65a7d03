"""Benchmarks as the command line starts them."""

import argparse
import sys
from pathlib import Path

from longvq_layers.benchmarks import __main__ as command


def run(monkeypatch, *words: str) -> None:
    """`python -m longvq_layers.benchmarks WORDS`."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    command.main()


def parsed(module, out: Path, *words: str) -> argparse.Namespace:
    """The options of a benchmark's module that writes to `out` and uses one thread."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([*words, "--threads", "1", "--out", str(out)])
