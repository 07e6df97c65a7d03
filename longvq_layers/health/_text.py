"""Numbers and tables as text."""

import math
from collections.abc import Sequence


def number(value: float | None) -> str:
    """Three digits; "-" without a reading."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


def percent(share: float) -> str:
    return f"{share:.1%}" if 0 < share < 0.1 or 0.9 < share < 1 else f"{share:.0%}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the first column aligned to the left and the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def module(name: str) -> str:
    """The name of a module; the name of the model itself is empty."""
    return name or "(model)"
