"""Findings about parameters and their gradients."""

import math
from collections.abc import Iterator
from statistics import median_high, median_low

import torch
from torch import Tensor, nn

from longvq_layers.health import _parts, _text
from longvq_layers.health.finding import Finding
from longvq_layers.health.gradients import GradientRow, GradientTable
from longvq_layers.layers.ssm.diagonal import DiagonalSSM

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d)
_DAMAGED = "go back to a checkpoint from before; lower lr, clip the gradients (torch.nn.utils.clip_grad_norm_)"


def parameter_findings(model: nn.Module, limits: dict[str, float]) -> Iterator[Finding]:
    """Not finite, or amplifying beyond reason."""
    for name, parameter in model.named_parameters():
        bad = int((~parameter.isfinite()).sum())
        if bad:
            yield Finding(
                "error",
                "not_finite",
                name,
                f"{bad} of {parameter.numel()} elements are NaN or infinite",
                "nothing that comes after them is a number",
                _DAMAGED,
            )
    for name, module in model.named_modules():
        if isinstance(module, _LINEAR):
            weight = module.weight.detach()
            inputs = weight[0].numel() if len(weight) else 0
            gain = float(weight.float().square().mean().sqrt()) * math.sqrt(inputs) if weight.numel() else 0.0
            if math.isfinite(gain) and gain > limits["amplification"]:
                yield Finding(
                    "warning",
                    "large_weight",
                    f"{name}.weight" if name else "weight",
                    f"RMS {_text.number(gain / math.sqrt(inputs))}, it multiplies its input by about "
                    f"{_text.number(gain)} (0.6 after initialisation)",
                    "gates and softmax saturate behind it, and nothing else counts beside its output",
                    "a lower lr, weight_decay in optimizer_groups(model, lr=..., weight_decay=...), gradient clipping; "
                    "initialise this layer anew (reset_parameters())",
                )


def ssm_findings(model: nn.Module, limits: dict[str, float]) -> Iterator[Finding]:
    """Steps and decays that leave an SSM without a useful memory."""
    for name, ssm in model.named_modules():
        if not isinstance(ssm, DiagonalSSM):
            continue
        dt = ssm.log_dt.detach().double().exp()
        log_decay, _, _ = ssm.discrete(torch.float64)
        slowest = -log_decay.detach().real.amax(-1)  # (H,) decay per step of the mode that lasts longest
        if not (bool(dt.isfinite().all()) and bool(slowest.isfinite().all())):
            continue  # reported as a parameter that is not finite
        short, long = dt < limits["step_size"] * ssm.dt_min, slowest > limits["decay"]
        if _share(short) >= limits["channel_share"]:
            yield Finding(
                "warning",
                "step_size_collapsed",
                name,
                f"the step Δ of {_text.percent(_share(short))} of the channels is below "
                f"{_text.number(limits['step_size'] * ssm.dt_min)} (the smallest is {_text.number(float(dt.min()))}; "
                f"dt_min={ssm.dt_min})",
                "the state takes in next to nothing per position, the channel only passes its skip connection",
                'a smaller ssm_lr in optimizer_groups (ssm_lr={"dt": 1e-4}), no weight_decay on log_dt, or "dt" left '
                "out of trained=",
            )
        if _share(long) >= limits["channel_share"]:
            yield Finding(
                "warning",
                "memory_lost",
                name,
                f"all poles of {_text.percent(_share(long))} of the channels decay within one step (by "
                f"exp(-{_text.number(float(slowest.max()))}) at most; Δ up to {_text.number(float(dt.max()))})",
                "a channel whose state is gone at the next position is no memory: the SSM is too weak",
                f"a smaller dt_max (now {ssm.dt_max}) and a smaller ssm_lr in optimizer_groups; "
                'init="lin" instead of "real" for slower poles',
            )


def gradient_findings(table: GradientTable, limits: dict[str, float]) -> Iterator[Finding]:
    """Gradients that are not numbers, nothing, or out of proportion to those of the other blocks."""
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
    for kind in _parts.KINDS:
        rows = [row for row in table if row.kind == kind and row.block is not None and row.rms > 0 and not row.bad]
        yield from _out_of_proportion(rows, limits["gradient_ratio"])


def _out_of_proportion(rows: list[GradientRow], limit: float) -> Iterator[Finding]:
    for row in rows:
        others = [other.rms for other in rows if other is not row]
        if not others:
            continue
        high, low = median_high(others), median_low(others)  # an odd one among two others must not decide
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
        elif row.rms <= low / limit and len(rows) > 2:  # of two blocks the larger one is named
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
    also = 'norm="pre", and the gates, large weights and norms of the blocks behind it'
    return f"{advice[row.kind]}; {also}" if row.kind in advice else also


def _share(which: Tensor) -> float:
    return float(which.double().mean()) if which.numel() else 0.0
