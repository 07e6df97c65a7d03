"""What the pictures of the benchmarks have in common: panels in a row, an axis of lengths."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

OURS = "#1261a0"


def save(path: Path, panels: Sequence[Callable[[Axes], None]]) -> None:
    """Write a PNG with the panels side by side."""
    count = max(len(panels), 1)
    with pyplot.rc_context({"axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left"}):
        figure, grid = pyplot.subplots(1, count, figsize=(6.5 * count, 4.6), squeeze=False)
        for axes, panel in zip(grid[0], panels, strict=False):
            panel(axes)
        figure.tight_layout(w_pad=2.5)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def series(axes: Axes, lines: Mapping[str, tuple[Sequence, Sequence, str]], label: str) -> None:
    """Lines over the length, the values on a logarithmic axis.

    Args:
        lines: name -> lengths, values, colour.
        label: of the axis of values.
    """
    for name, (lengths, values, colour) in lines.items():
        axes.plot(lengths, values, "o-", color=colour, label=name)
    length_axis(axes, sorted({length for lengths, *_ in lines.values() for length in lengths}))
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.legend(frameon=False)


def length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("length")
