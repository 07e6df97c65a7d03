"""The picture of the benchmark of attention: forward time over the length, ours and the peer, a panel for each form."""

from pathlib import Path

from matplotlib.axes import Axes

from longvq_layers.benchmarks import plot
from longvq_layers.benchmarks.attention_report import Row, by_length

_LINES = {"ours": ("ours", plot.OURS), "sdpa": ("fused sdpa", "#8a8f98")}


def draw(path: Path, rows: list[Row]) -> None:
    """Write a PNG with a panel for each form that was measured."""
    forms = [form for form in ("bidirectional", "causal") if by_length(rows, form, "ours")]
    plot.save(path, [lambda axes, form=form: _forward(axes, rows, form) for form in forms])


def _forward(axes: Axes, rows: list[Row], form: str) -> None:
    for method, (label, colour) in _LINES.items():
        measured = by_length(rows, form, method)
        axes.plot([r.L for r in measured], [r.seconds * 1e3 for r in measured], "o-", color=colour, label=label)
    axes.set_yscale("log")
    plot.length_axis(axes, [row.L for row in by_length(rows, form, "ours")])
    axes.set_ylabel("forward, ms")
    axes.set_title(f"Attention forward, {form}")
    axes.legend(frameon=False)
