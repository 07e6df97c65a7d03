"""The picture of the benchmark of attention: the time of a forward over the length."""

from longvq_layers.benchmarks.attention.rows import Row, by_length
from longvq_layers.benchmarks.common import plot

_LINES = {"ours": ("ours", plot.OURS), "sdpa": ("fused sdpa", plot.GREY)}  # method -> label and colour


def panels(rows: list[Row]) -> list[plot.Panel]:
    """Forward time over the length, a panel for each form that was measured."""
    return [_panel(rows, form) for form in ("bidirectional", "causal") if by_length(rows, form, "ours")]


def _panel(rows: list[Row], form: str) -> plot.Panel:
    lines = {}
    for method, (label, colour) in _LINES.items():
        measured = by_length(rows, form, method)
        lines[label] = plot.Line([r.L for r in measured], [r.seconds * 1e3 for r in measured], colour)
    return plot.lines(lines, "forward, ms", title=f"Attention forward, {form}", logarithmic=True)
