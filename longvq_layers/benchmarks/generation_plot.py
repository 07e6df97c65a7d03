"""The picture of the benchmark of generation: time per token and memory over the context."""

from pathlib import Path

from matplotlib.axes import Axes

from longvq_layers.benchmarks import plot

_SERIES = {"ours": ("replaced", plot.OURS), "own": ("own cache", "#b9791f")}


def draw(path: Path, rows: list) -> None:
    """Write a PNG with a panel of time and one of memory."""
    plot.save(
        path,
        [
            lambda axes: _panel(axes, rows, "ms", "ms a token", 1.0),
            lambda axes: _panel(axes, rows, "bytes", "cache, MB", 1e-6),
        ],
    )


def _panel(axes: Axes, rows: list, unit: str, label: str, factor: float) -> None:
    contexts = [row.context for row in rows]
    lines = {
        text: (contexts, [getattr(row, f"{name}_{unit}") * factor for row in rows], colour)
        for name, (text, colour) in _SERIES.items()
    }
    plot.series(axes, lines, label)
