"""Findings about the values of parameters."""

import math
from collections.abc import Iterator, Mapping

from torch import nn

from longvq_layers.health import _text
from longvq_layers.health.finding import Finding


def parameter_findings(model: nn.Module, limits: Mapping[str, float]) -> Iterator[Finding]:
    """Parameters that are not finite, weights that amplify too much."""
    for name, parameter in model.named_parameters():
        bad = int((~parameter.isfinite()).sum())
        if bad:
            yield Finding(
                "error",
                "not_finite",
                name,
                f"{bad} of {parameter.numel()} elements are NaN or infinite",
                "nothing that comes after them is a number",
                "go back to a checkpoint from before; lower lr, clip the gradients (torch.nn.utils.clip_grad_norm_)",
            )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
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
                    "the gates and the softmax after it saturate, and its output outweighs all others",
                    "a lower lr, weight_decay in optimizer_groups(model, lr=..., weight_decay=...), gradient clipping; "
                    "initialise this layer anew (reset_parameters())",
                )
