"""The picture of the benchmark of a rotary model: what it predicts and recalls over the length."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes

from longvq_layers.benchmarks import plot


def draw(path: Path, rows: list) -> None:
    """Write a PNG with a panel of source text, one of keys and, where there was any, one of keys after fine-tuning."""
    before, after = ([row for row in rows if row.fine_tuned == tuned] for tuned in (False, True))
    panels = [
        lambda axes: _panel(axes, before, "source", "bits per byte", lambda row: row.bits_per_byte),
        lambda axes: _panel(axes, before, "key", "keys recalled", lambda row: row.right),
    ]
    if after:
        panels.append(lambda axes: _panel(axes, after, "key", "keys recalled, fine-tuned", lambda row: row.right))
    plot.save(path, panels)


def _panel(axes: Axes, rows: list, text: str, label: str, value: Callable) -> None:
    for name in dict.fromkeys(row.attention for row in rows):
        chosen = [row for row in rows if (row.attention, row.text) == (name, text)]
        axes.plot([row.length for row in chosen], [value(row) for row in chosen], "o-", label=name)
    plot.length_axis(axes, sorted({row.length for row in rows}))
    axes.set_title(text)
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=7)
