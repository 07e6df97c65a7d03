"""Findings about state space models."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from longvq_layers.health import _text
from longvq_layers.health.finding import Finding
from longvq_layers.layers.ssm.diagonal import DiagonalSSM


def ssm_findings(model: nn.Module, limits: Mapping[str, float]) -> Iterator[Finding]:
    """Step sizes and decays that leave an SSM without a useful memory."""
    for name, ssm in model.named_modules():
        if not isinstance(ssm, DiagonalSSM):
            continue
        dt = ssm.log_dt.detach().double().exp()
        log_decay, _, _ = ssm.discrete(torch.float64)
        slowest = -log_decay.detach().real.amax(-1)  # (H,) decay per step of the slowest mode
        if not (bool(dt.isfinite().all()) and bool(slowest.isfinite().all())):
            continue  # `parameter_findings` reports parameters that are not finite
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


def _share(which: Tensor) -> float:
    return float(which.double().mean()) if which.numel() else 0.0
