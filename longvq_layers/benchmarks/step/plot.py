"""The picture of the benchmark of a training step: seconds and memory over the length."""

from pathlib import Path

from matplotlib.axes import Axes

from longvq_layers.benchmarks import plot

_COLOURS = {"longvq": plot.OURS, "longvq, recompute": "#7a3b9e", "fused": "#b9791f", "dense": "#8a8f98"}


def draw(path: Path, rows: list) -> None:
    """Write a PNG with a panel of time and one of memory."""
    plot.save(
        path,
        [
            lambda axes: _panel(axes, rows, "seconds", "seconds a step", 1.0),
            lambda axes: _panel(axes, rows, "peak_bytes", "peak memory, MB", 1e-6),
        ],
    )


def _panel(axes: Axes, rows: list, field: str, label: str, unit: float) -> None:
    lines = {}
    for model, colour in _COLOURS.items():
        chosen = [row for row in rows if row.model == model and getattr(row, field)]
        lines[model] = ([row.L for row in chosen], [getattr(row, field) * unit for row in chosen], colour)
    plot.series(axes, lines, label)
