"""The picture of the benchmark of the scan: milliseconds of each method, time per element over the length."""

from typing import TYPE_CHECKING

from longvq_layers.benchmarks.common import plot
from longvq_layers.benchmarks.ssm.rows import TIMED, Row, find
from longvq_layers.benchmarks.ssm.targets import SCALING_TARGET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "ours": plot.OURS,
    "vandermonde": plot.GREY,
    "fft": plot.AMBER,
    "torch": plot.LIGHT,
    "copy": "#cdd1d8",
}


def panels(rows: list[Row]) -> list[plot.Panel]:
    """A panel of methods and one of lengths, as far as they were measured."""
    cases = [row for row in rows if row.case in TIMED and row.method == "ours"]
    scaling = [row for row in rows if row.case == "scaling"]
    found: list[plot.Panel] = []
    if cases:
        found.append(lambda axes: _methods(axes, rows, cases))
    if scaling:
        found.append(lambda axes: _scaling(axes, scaling))
    return found


def _methods(axes: "Axes", rows: list[Row], cases: list[Row]) -> None:
    methods = tuple(_COLOURS)
    width = 0.84 / len(methods)
    for index, method in enumerate(methods):
        found = [(place, find(rows, case.case, case.L, method)) for place, case in enumerate(cases)]
        timed = [(place, row.seconds * 1e3) for place, row in found if row and row.timed]
        places = [place + (index - (len(methods) - 1) / 2) * width for place, _ in timed]
        bars = axes.bar(places, [ms for _, ms in timed], width, color=_COLOURS[method], label=method)
        axes.bar_label(bars, [f"{ms:.2g}" if ms < 100 else f"{ms:,.0f}" for _, ms in timed], fontsize=7)
    axes.set_xticks(range(len(cases)), [f"{row.case}\nB = {row.B}, L = {row.L:,}" for row in cases])
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.set_title("Time by method", pad=22)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=len(methods))


def _scaling(axes: "Axes", rows: list[Row]) -> None:
    lengths, times = [row.L for row in rows], [row.per_element * 1e9 for row in rows]
    axes.plot(lengths, times, "o-", color=_COLOURS["ours"])
    axes.axhspan(min(times), SCALING_TARGET * min(times), color=plot.SHADE, zorder=0)
    plot.length_axis(axes, lengths)
    axes.set_ylim(0, 1.2 * max(*times, SCALING_TARGET * min(times)))
    axes.set_ylabel("forward, ns per element")
    axes.set_title(f"Time per element (shaded: up to {SCALING_TARGET} times the least)", pad=22)
