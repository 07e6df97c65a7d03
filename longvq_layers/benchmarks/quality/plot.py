"""The picture of the benchmark of quality: mean cosine over the number of codes, a panel for each window."""

from pathlib import Path

from matplotlib.axes import Axes

from longvq_layers.benchmarks import plot

_COLOURS = ("#8a8f98", "#b9791f", "#2e8b57", "#7a3b9e", plot.OURS, "#b03a2e", "#0b7a75", "#111111")


def draw(path: Path, rows: list) -> None:
    """Write a PNG with a panel for each window."""
    windows = sorted({row.window for row in rows})
    plot.save(path, [lambda axes, window=window: _panel(axes, rows, window) for window in windows])


def _panel(axes: Axes, rows: list, window: int) -> None:
    methods = list(dict.fromkeys(row.method for row in rows))
    for number, method in enumerate(methods):
        points = sorted((row.codes, row.cosine) for row in rows if (row.method, row.window) == (method, window))
        if points:
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=method)
    plot.length_axis(axes, sorted({row.codes for row in rows}))
    axes.set_xlabel("codes")
    axes.set_ylabel("mean cosine of embeddings before and after")
    axes.set_title(f"window {window}")
    axes.legend(frameon=False)
