"""Findings about gradients."""

from collections.abc import Iterator, Mapping
from statistics import median_high, median_low

from longvq_layers.health import _model_parts, _text
from longvq_layers.health.finding import Finding
from longvq_layers.health.gradients import GradientRow, GradientTable


def gradient_findings(table: GradientTable, limits: Mapping[str, float]) -> Iterator[Finding]:
    """Gradients that are not finite, zero, or far larger or smaller than those of the other blocks."""
    if not table.any_nonzero:
        if any(row.grad_norm == 0 for row in table):
            yield Finding(
                "note",
                "gradient_vanishing",
                "",
                "all gradients are exactly 0",
                "after zero_grad(set_to_none=False) that is as it should be; after backward() nothing learns",
                "call diagnose between backward() and zero_grad(); else look whether the loss depends on the model",
            )
        return
    for row in table:
        if row.bad:
            yield Finding(
                "error",
                "gradient_not_finite",
                row.name,
                f"{row.kind}: NaN or infinity in the gradient of {', '.join(row.bad[:3])}"
                + (f" and {len(row.bad) - 3} more" if len(row.bad) > 3 else ""),
                "one optimiser step with it and the parameters are lost",
                "skip this step; lower lr, clip the gradients, look at the loss (log or division by 0), and in float16 "
                "use torch.amp.GradScaler or bfloat16",
            )
        elif row.rms == 0 and row.param_norm:
            yield Finding(
                "warning",
                "gradient_vanishing",
                row.name,
                f"{row.kind}: the gradient is exactly 0",
                "these parameters do not learn",
                _vanishing_advice(row),
            )
    for kind in _model_parts.KINDS:
        rows = [row for row in table if row.kind == kind and row.block is not None and row.rms > 0 and not row.bad]
        yield from _out_of_proportion(rows, limits["gradient_ratio"])


def _out_of_proportion(rows: list[GradientRow], limit: float) -> Iterator[Finding]:
    for row in rows:
        others = [other.rms for other in rows if other is not row]
        if not others:
            continue
        high, low = median_high(others), median_low(others)  # one exceptional value of two must not decide
        if row.rms >= limit * high:
            yield Finding(
                "warning",
                "gradient_exploding",
                row.name,
                _times(row, high),
                "one block takes the whole step, or the whole norm that clipping allows, and the others stand still",
                f"a smaller lr for these parameters (a group of their own), {_LOWER[row.kind]}, gradient clipping, "
                'norm="pre"',
            )
        elif row.rms <= low / limit and len(rows) > 2:  # of two blocks only the larger one is reported
            yield Finding(
                "warning",
                "gradient_vanishing",
                row.name,
                _times(row, low),
                "these parameters hardly learn while those of other blocks do",
                _vanishing_advice(row),
            )


def _times(row: GradientRow, others: float) -> str:
    times = _text.number(row.rms / others)
    return f"{row.kind}: RMS gradient {_text.number(row.rms)}, {times} times that of the other blocks"


_LOWER = {
    "ssm": "a smaller ssm_lr in optimizer_groups, a smaller dt_max",
    "codebook/keys": "a smaller commitment",
    "attention": "smaller weights (weight_decay in optimizer_groups)",
    "gates": "smaller weights of the gates",
    "feed-forward": "smaller weights (weight_decay in optimizer_groups)",
    "embedding/other": "smaller weights (weight_decay in optimizer_groups)",
}


def _vanishing_advice(row: GradientRow) -> str:
    advice = {
        "ssm": "a larger ssm_lr in optimizer_groups",
        "codebook/keys": 'key_grad="cluster", a larger window, more commitment',
        "attention": "look whether attention_gate or output_gate of this block is closed",
        "gates": "saturated gates have no slope: smaller weights and biases of output_gate and attention_gate",
    }
    also = 'norm="pre", and the gates, large weights and norms of the blocks after it'
    return f"{advice[row.kind]}; {also}" if row.kind in advice else also
