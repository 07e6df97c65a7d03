"""Parameter groups for optimisers: parameters of state space models get a small learning rate and no decay."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.ssm.diagonal import TRAINABLE

_SSM_LR = 1e-3
_Rate: TypeAlias = float | Tensor


def optimizer_groups(
    model: nn.Module, *, lr: _Rate, weight_decay: _Rate, ssm_lr: _Rate | Mapping[str, _Rate] = _SSM_LR
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into groups for any torch optimiser.

    | group | parameters | learning rate | weight decay |
    |---|---|---|---|
    | "ssm" | step size, poles and input of the SSM (Δ, A, B) | the smaller of `lr` and `ssm_lr` | 0 |
    | "no_decay" | C and D of the SSM, window biases, all vectors and scalars (biases, norms) | `lr` | 0 |
    | "decay" | everything else, the weight matrices | `lr` | `weight_decay` |

    If `ssm_lr` is a mapping, "ssm_A" (log_A_real, A_imag), "ssm_B" (B) and "ssm_dt" (log_dt) take the place of "ssm".
    C keeps the full rate: it is a readout like any linear layer. Biases, norms and window biases are not decayed,
    because nothing favours the value 0 for them. A shared parameter appears once: if it belongs to several rows of the
    table, it gets the first of them. Empty groups are left out.

    Args:
        model: any module.
        lr: learning rate of ordinary parameters.
        weight_decay: decay of the weight matrices.
        ssm_lr: learning rate of step size, poles and input, default 1e-3. Or a mapping with rates of "A", "B" and "dt";
            a missing rate is 1e-3. To freeze one of them, leave it out of the layer's `trained`.

    Returns:
        List of dicts with "name", "params", "lr" and "weight_decay".

    Raises:
        ValueError: a negative rate or decay, an unknown name in `ssm_lr`.
        TypeError: a rate or decay that isn't a number or a tensor with one element.

    Example:
        >>> import torch, longvq_layers
        >>> groups = optimizer_groups(longvq_layers.S4DLayer(8), lr=3e-3, weight_decay=0.01)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('ssm', 0.001, 0.0), ('no_decay', 0.003, 0.0), ('decay', 0.003, 0.01)]
        >>> optimizer = torch.optim.AdamW(groups)

    Source: Gu et al. 2022 (arXiv 2206.11893), section 4, training details.
    """
    slow = _slow_rates(ssm_lr)
    for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
        _check_rate(name, value)
    settings: dict[str, tuple[_Rate, _Rate]] = {name: (min(lr, rate), 0.0) for name, rate in slow.items()}
    settings |= {"no_decay": (lr, 0.0), "decay": (lr, weight_decay)}
    members: dict[str, dict[int, nn.Parameter]] = {name: {} for name in settings}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            members[_role(module, name, parameter, "ssm" not in slow)][id(parameter)] = parameter
    groups: list[dict[str, Any]] = []  # the type that optimisers of torch take
    taken: set[int] = set()
    for name, (rate, decay) in settings.items():
        params = [p for key, p in members[name].items() if p.requires_grad and key not in taken]
        taken.update(members[name])
        if params:
            groups.append({"name": name, "params": params, "lr": rate, "weight_decay": decay})
    return groups


def _slow_rates(ssm_lr: _Rate | Mapping[str, _Rate]) -> dict[str, _Rate]:
    """The rate of each group of SSM parameters: one group "ssm", or one for each name in `TRAINABLE`."""
    if not isinstance(ssm_lr, Mapping):
        _check_rate("ssm_lr", ssm_lr)
        return {"ssm": ssm_lr}
    unknown = [kind for kind in ssm_lr if kind not in TRAINABLE]
    if unknown:
        raise ValueError(
            f"optimizer_groups: ssm_lr must have rates of {', '.join(map(repr, TRAINABLE))} only, got {unknown}"
        )
    for kind, rate in ssm_lr.items():
        _check_rate(f"ssm_lr[{kind!r}]", rate)
    return {f"ssm_{kind}": ssm_lr.get(kind, _SSM_LR) for kind in TRAINABLE}


def _check_rate(name: str, value: _Rate) -> None:
    if not (isinstance(value, Tensor) and value.numel() == 1):  # torch's optimisers take such tensors as well
        check.number("optimizer_groups", name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"optimizer_groups: {name} must be a finite number, at least 0, got {value}")


def _role(module: nn.Module, name: str, parameter: nn.Parameter, split: bool) -> str:
    slow = getattr(module, "slow_parameters", {})  # parameter name -> "A", "B" or "dt"
    if name in slow:
        return f"ssm_{slow[name]}" if split else "ssm"
    if name in getattr(module, "no_decay_parameters", ()) or parameter.dim() < 2:
        return "no_decay"
    return "decay"
