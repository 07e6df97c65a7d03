"""What the benchmarks have in common in what they print and write."""

import csv
import importlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

import longvq_layers
from longvq_layers import _extension


def machine(threads: int) -> str:
    return (
        f"longvq_layers {longvq_layers.__version__}, torch {torch.__version__}, {platform.processor() or 'CPU'} "
        f"{platform.machine()}, {threads} threads, native instruction set {_extension.cpu_capability()}"
    )


def met(met: bool) -> str:
    return "met" if met else "not met"


def write(name: str, folder: Path, rows: Sequence, **everywhere: object) -> None:
    """results.csv and, with matplotlib, the picture of `NAME_plot.draw`; says where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "results.csv", folder / f"{name}.png"
    write_csv(rows, table, **everywhere)
    print(f"Written: {table}", end="")
    try:
        import matplotlib  # noqa: F401

        plot = importlib.import_module(f"longvq_layers.benchmarks.{name}_plot")
    except ImportError as error:
        print(f"; no plot: {error} (pip install matplotlib)")
        return
    plot.draw(picture, rows)
    print(f", {picture}")


def write_csv(rows: Sequence, path: Path, **everywhere: object) -> None:
    """One line per row, all of one dataclass; `everywhere` are columns with the same value in all of them."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(rows[0])), *everywhere])
        writer.writeheader()
        writer.writerows({**asdict(row), **everywhere} for row in rows)
