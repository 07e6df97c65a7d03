"""Command-line options that several benchmarks have."""

import argparse
from pathlib import Path

import torch


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test that it runs; figures mean nothing")


def add_repeats(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--repeats", type=int, default=default, help="rounds, default %(default)s")


def add_threads(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """`--threads`, by default as many as PyTorch uses."""
    threads = torch.get_num_threads() if default is None else default
    parser.add_argument("--threads", type=int, default=threads, help="default %(default)s")


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path(default), metavar="DIR", help="folder of the results, default %(default)s/"
    )
