"""The curve of a run: a CSV file with one line for each evaluation."""

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

COLUMNS = (
    "step",
    "seconds",
    "train_loss",
    "commitment",
    "val_loss",
    "val_accuracy",
    "val_bits_per_byte",
    "lr",
    "grad_norm",
    "codes_used",
    "perplexity",
    "quantization_error",
    "attention_entropy",
    "output_gate",
)
TIMES = ("seconds",)  # columns that differ between two runs with the same settings


class Log:
    """Appends lines to `path`, after it removed the lines that a resumed run will write again.

    Args:
        path: of the CSV file.
        resume_at: step of the checkpoint from which the run continues; 0 = a new run.
    """

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        self.path = path
        kept = [row for row in read(path) if (row["step"] or 0) <= resume_at] if resume_at and path.exists() else []
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({name: _text(value) for name, value in row.items()} for row in kept)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a line and close the file."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({name: _text(row.get(name)) for name in COLUMNS})


def read(path: Path) -> list[dict[str, float | None]]:
    """The lines of such a file as numbers; None where a column is empty."""
    with path.open(newline="") as file:
        return [{name: _number(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def column(rows: Iterable[Mapping[str, float | None]], name: str) -> list[float]:
    """The values of one column; NaN where it is empty."""
    values = (row[name] for row in rows)
    return [math.nan if value is None else value for value in values]


def _number(name: str, text: str) -> float | int | None:
    if not text:
        return None
    return int(text) if name == "step" else float(text)


def _text(value: float | None) -> str:
    return "" if value is None else repr(value)
