"""Pictures of panels side by side, most of them lines over the length. matplotlib is imported when one is drawn."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes"], None]
"""Draws into one panel of a picture."""

OURS = "#1261a0"
LIGHT = "#8fc1e3"
GREY, AMBER, PURPLE = "#8a8f98", "#b9791f", "#7a3b9e"
SHADE = "#e6e8ec"  # of a grid or of an area


class Line(NamedTuple):
    """Points of one line; without a colour, matplotlib's next one."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str | None = None


def save(path: Path, panels: Sequence[Panel]) -> None:
    """Write a PNG with the panels side by side."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    count = max(len(panels), 1)
    with pyplot.rc_context({"axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left"}):
        figure, grid = pyplot.subplots(1, count, figsize=(6.5 * count, 4.6), squeeze=False)
        for axes, panel in zip(grid[0], panels, strict=False):
            panel(axes)
        figure.tight_layout(w_pad=2.5)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def lines(
    lines: Mapping[str, Line],
    label: str,
    *,
    title: str = "",
    x_label: str = "length",
    logarithmic: bool = False,
    legend_size: float | None = None,
) -> Panel:
    """A panel of lines.

    Args:
        lines: label -> line.
        label: of the vertical axis.
        title: of the panel.
        x_label: of the horizontal axis, which is logarithmic to base 2.
        logarithmic: also the vertical axis.
        legend_size: of the letters, default matplotlib's.
    """

    def draw(axes: "Axes") -> None:
        for name, line in lines.items():
            axes.plot(line.x, line.y, "o-", color=line.colour, label=name)
        length_axis(axes, sorted({x for line in lines.values() for x in line.x}), x_label)
        if logarithmic:
            axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=legend_size)

    return draw


def length_axis(axes: "Axes", lengths: Sequence[float], label: str = "length") -> None:
    """A logarithmic axis with a tick at every length."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
