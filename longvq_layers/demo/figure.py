"""The picture: quality, time and memory of the swap, and the training curve."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from longvq_layers.benchmarks.common import plot
from longvq_layers.demo.results import QualityResult, SpeedResult, TrainingResult
from longvq_layers.demo.speed import faster_from

_INK = "#2b2f36"
_STYLE: dict[Any, object] = {  # matplotlib's settings by name
    "axes.edgecolor": "#b8bcc4",
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "font.size": 10,
    "grid.color": plot.SHADE,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def draw(path: Path, quality: QualityResult | None, speed: SpeedResult | None, training: TrainingResult | None) -> None:
    """Write a PNG with the panels of the parts that ran."""
    panels: list[plot.Panel] = []
    if quality:
        panels.append(lambda axes: _quality(axes, quality))
    if speed:
        panels.append(lambda axes: _time(axes, speed))
        if all(row.our_bytes is not None for row in speed.rows):
            panels.append(lambda axes: _memory(axes, speed))
    if training:
        panels.append(lambda axes: _training(axes, training))
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    with pyplot.rc_context(_STYLE):
        figure, grid = pyplot.subplots(rows, columns, figsize=(6.4 * columns, 4.4 * rows), squeeze=False)
        cells = list(grid.flat)
        for cell, panel in zip(cells, panels, strict=False):
            panel(cell)
        for cell in cells[len(panels) :]:
            cell.set_axis_off()
        figure.tight_layout(h_pad=2.5, w_pad=2.5)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _quality(axes: Axes, result: QualityResult) -> None:
    places = range(len(result.rows))
    series = [
        ("cosine similarity of embeddings", [row.cosine for row in result.rows], plot.OURS, -0.2),
        ("same nearest neighbour", [row.neighbours for row in result.rows], plot.LIGHT, 0.2),
    ]
    for label, values, colour, shift in series:
        bars = axes.bar([place + shift for place in places], values, 0.38, color=colour, label=label)
        spec = ".3f" if colour == plot.OURS else ".0%"
        axes.bar_label(bars, [format(value, spec) for value in values], fontsize=8.5)
    axes.set_xticks(list(places), [f"{row.num_codes} / {row.window}" for row in result.rows])
    axes.set_xlabel("codes per head / window (tokens)")
    lowest = min(min(values) for _, values, _, _ in series)
    axes.set_ylim(max(0.0, int(lowest * 10 - 1) / 10), 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("agreement with the original model")
    axes.set_title(f"Attention swapped, no training: {result.model.partition(' ')[0]}", pad=26)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=2, fontsize=9, borderaxespad=0.2)


def _time(axes: Axes, result: SpeedResult) -> None:
    own, ours = [row.own_seconds * 1e3 for row in result.rows], [row.our_seconds * 1e3 for row in result.rows]
    _two_lines(axes, result, own, ours)
    axes.set_ylabel("time of one forward (ms)")
    crossing = faster_from(result.rows)
    last = result.rows[-1]
    remark = "" if crossing is None else f", faster from {crossing:,} tokens"
    axes.set_title(f"Time: {last.speed_up:.1f} times as fast at {last.length:,}{remark}")


def _memory(axes: Axes, result: SpeedResult) -> None:
    own, ours = [row.own_bytes or 0 for row in result.rows], [row.our_bytes or 0 for row in result.rows]
    _two_lines(axes, result, [value / 2**20 for value in own], [value / 2**20 for value in ours])
    axes.set_ylabel("peak extra memory of one forward (MiB)")
    share, length = ours[-1] / max(own[-1], 1), result.rows[-1].length
    axes.set_title(f"Memory: {share:.0%} of the original at {length:,} tokens")


def _two_lines(axes: Axes, result: SpeedResult, own: list[float], ours: list[float]) -> None:
    lengths = [row.length for row in result.rows]
    axes.plot(lengths, own, "o-", color=plot.GREY, label="own attention (fused sdpa)")
    axes.plot(lengths, ours, "o-", color=plot.OURS, label=f"ours, {result.num_codes} codes, window {result.window}")
    plot.length_axis(axes, lengths, "length (tokens)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(own + ours) < 100 * min(own + ours) else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(loc="upper left", fontsize=9)


def _training(axes: Axes, result: TrainingResult) -> None:
    seconds, bits = [p.seconds for p in result.points], [p.bits_per_byte for p in result.points]
    axes.plot(seconds, bits, "o-", color=plot.OURS)
    axes.annotate(f"{bits[-1]:.2f}", (seconds[-1], bits[-1]), (0, 9), textcoords="offset points", ha="center")
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("bits per byte on held-out files")
    axes.set_ylim(0, max(*bits, 8.0) * 1.05)
    axes.set_xlim(left=0)
    axes.set_title("Training: a byte language model of LongVQ blocks")
