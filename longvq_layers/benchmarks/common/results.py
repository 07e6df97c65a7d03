"""What the benchmarks print about themselves, and the files that they write."""

import csv
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

import longvq_layers
from longvq_layers import _extension
from longvq_layers.benchmarks.common import plot


class Dataclass(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def machine(threads: int) -> str:
    return (
        f"longvq_layers {longvq_layers.__version__}, torch {torch.__version__}, {platform.processor() or 'CPU'} "
        f"{platform.machine()}, {threads} threads, native instruction set {_extension.cpu_capability()}"
    )


def say(line: object) -> None:
    """Progress, on stderr, so that stdout holds the report alone."""
    print(line, file=sys.stderr, flush=True)


def met(met: bool) -> str:
    return "met" if met else "not met"


def write(
    name: str,
    folder: Path,
    rows: Sequence[Dataclass],
    panels: Sequence[plot.Panel],
    **everywhere: object,
) -> None:
    """Write results.csv and, with matplotlib, a picture; print their paths.

    Args:
        name: of the benchmark; the picture is NAME.png.
        folder: made if it does not exist.
        rows: of one dataclass; at least one.
        panels: of the picture.
        everywhere: columns with the same value in every row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "results.csv", folder / f"{name}.png"
    _write_csv(rows, table, **everywhere)
    print(f"Written: {table}", end="")
    try:
        plot.save(picture, panels)
    except ImportError as error:
        print(f"; no plot: {error} (pip install matplotlib)")
        return
    print(f", {picture}")


def _write_csv(rows: Sequence[Dataclass], path: Path, **everywhere: object) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(rows[0])), *everywhere])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in (asdict(row) | everywhere).items()})


def _cell(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value  # NaN: not measured
