"""Find what is wrong with a training run, and what to change."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from longvq_layers import _checks as check
from longvq_layers.health.finding import SEVERITIES, Finding
from longvq_layers.health.gradients import gradient_scales
from longvq_layers.health.monitor import Monitor
from longvq_layers.health.rules.attention import commitment_findings, entropy_findings
from longvq_layers.health.rules.codebooks import codebook_findings
from longvq_layers.health.rules.gates import gate_findings
from longvq_layers.health.rules.gradients import gradient_findings
from longvq_layers.health.rules.parameters import parameter_findings
from longvq_layers.health.rules.ssm import ssm_findings
from longvq_layers.health.thresholds import with_changes


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`; `print` shows it.

    Attributes:
        findings: the most severe first, otherwise in the order of the model.
    """

    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether all findings are notes."""
        return all(finding.severity == "note" for finding in self.findings)

    def __str__(self) -> str:
        if not self.findings:
            return "healthy"
        counts = {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES}
        title = ", ".join(f"{n} {severity}{'s' if n > 1 else ''}" for severity, n in counts.items() if n)
        return "\n".join([f"healthy, {title}" if self.healthy else title, *map(str, self.findings)])


@torch.no_grad()
def diagnose(
    model: nn.Module, monitor: Monitor | None = None, *, thresholds: Mapping[str, float] | None = None
) -> Diagnosis:
    """Look for causes why a model does not learn: dead or collapsed codebooks, uniform attention, closed gates, very
    large or small gradients, an SSM without memory, NaN and infinity.

    Codebooks and parameters are read from the model, and so are gradients between `backward()` and `zero_grad()`.
    Entropy, the values of the gates and the commitment loss need a monitor. With a monitor, the gradients of its last
    `after_backward` are used if those of the model are missing or all zero.

    Args:
        model: any module; not changed.
        monitor: of this model, default none.
        thresholds: name -> value, to replace values of `THRESHOLDS`, default none.

    Returns:
        A `Diagnosis`: findings with severity, module, what was seen, why it matters and what to change.

    Raises:
        TypeError: `model` is not a module, `monitor` is not a `Monitor`, or a threshold is not a number.
        ValueError: an unknown threshold, a monitor of another model, or a model on the meta device.

    Example:
        >>> import longvq_layers
        >>> layer = longvq_layers.VQAttention(32, 2, num_codes=16)
        >>> [(finding.severity, finding.module) for finding in diagnose(layer).findings]
        [('error', 'attention.codebook')]
        >>> out = layer(torch.randn(2, 40, 32))
        >>> print(diagnose(layer))
        healthy
    """
    check.module("diagnose", "model", model)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("diagnose: model must have values, got tensors on the meta device")
    if monitor is not None and not isinstance(monitor, Monitor):
        raise TypeError(f"diagnose: monitor must be a Monitor, got {type(monitor).__name__}")
    if monitor is not None and monitor.model is not model:
        raise ValueError("diagnose: monitor must be one of the same model, got a monitor of another model")
    limits = with_changes(thresholds)
    gradients = gradient_scales(model)
    if monitor is not None and monitor.gradients is not None and not gradients.any_nonzero:
        gradients = monitor.gradients
    findings = [
        *parameter_findings(model, limits),
        *codebook_findings(model, limits),
        *ssm_findings(model, limits),
        *gradient_findings(gradients, limits),
        *gate_findings(model, monitor, limits),
    ]
    if monitor is not None:
        findings += [*entropy_findings(model, monitor, limits), *commitment_findings(monitor, limits)]
    return Diagnosis(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))
