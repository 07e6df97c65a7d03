"""What is wrong with a training run, and what to change."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from longvq_layers.health._activity_rules import commitment_findings, entropy_findings, gate_findings
from longvq_layers.health._codebook_rules import codebook_findings
from longvq_layers.health._parameter_rules import gradient_findings, parameter_findings, ssm_findings
from longvq_layers.health.finding import SEVERITIES, Finding
from longvq_layers.health.gradients import gradient_scales
from longvq_layers.health.monitor import Monitor
from longvq_layers.health.thresholds import chosen


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `print` tells it.

    Attributes:
        findings: the worst first, in the order of the model.
    """

    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether there is nothing worse than a note."""
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
    """Look for what keeps a model from learning: dead or collapsed codebooks, uniform attention, shut gates,
    gradients out of proportion, an SSM without memory, numbers that are none.

    Codebooks, parameters and (between `backward()` and `zero_grad()`) gradients are read from the model itself.
    Entropy, what the gates really let through and the commitment loss need a monitor; with one, the gradients of its
    last `after_backward` are used if the model has none at the moment, or only zeros.

    Args:
        model: any module; nothing is changed.
        monitor: of this model, default none.
        thresholds: values to use instead of those in `THRESHOLDS`, by name, default none.

    Returns:
        A `Diagnosis`: findings with severity, module, what was seen, why it matters and what to change.

    Raises:
        TypeError: `model` is no module, `monitor` no `Monitor`, or a threshold no number.
        ValueError: an unknown threshold, a monitor of another model, a model on the meta device, which has no numbers.

    Example:
        >>> import longvq_layers
        >>> layer = longvq_layers.VQAttention(32, 2, num_codes=16)
        >>> [(finding.severity, finding.module) for finding in diagnose(layer).findings]
        [('error', 'attention.codebook')]
        >>> out = layer(torch.randn(2, 40, 32))
        >>> print(diagnose(layer))
        healthy
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"diagnose: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("diagnose: model must have numbers, got tensors on the meta device")
    if monitor is not None and not isinstance(monitor, Monitor):
        raise TypeError(f"diagnose: monitor must be a Monitor, got {type(monitor).__name__}")
    if monitor is not None and monitor.model is not model:
        raise ValueError("diagnose: monitor must be one of the same model, got one of another")
    limits = chosen(thresholds)
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
