"""The picture of the benchmark of a rotary model: bits per byte over the length."""

from pathlib import Path

from matplotlib.axes import Axes

from longvq_layers.benchmarks import plot


def draw(path: Path, rows: list) -> None:
    """Write a PNG with a panel of source text, and one of keys after fine-tuning where there was any."""
    panels = [lambda axes: _panel(axes, [r for r in rows if r.text == "source" and not r.fine_tuned], "source")]
    tuned = [row for row in rows if row.text == "key" and row.fine_tuned]
    if tuned:
        panels.append(lambda axes: _panel(axes, tuned, "keys from the front, fine-tuned"))
    plot.save(path, panels)


def _panel(axes: Axes, rows: list, title: str) -> None:
    for name in dict.fromkeys(row.attention for row in rows):
        chosen = [row for row in rows if row.attention == name]
        axes.plot([row.length for row in chosen], [row.bits_per_byte for row in chosen], "o-", label=name)
    plot.length_axis(axes, sorted({row.length for row in rows}))
    axes.set_title(title)
    axes.set_ylabel("bits per byte")
    axes.legend(frameon=False, fontsize=7)
