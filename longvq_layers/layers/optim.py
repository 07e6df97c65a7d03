"""Optimiser groups: the parameters of a state space model learn slowly and are not decayed."""

from torch import nn


def optimizer_groups(model: nn.Module, *, lr: float, weight_decay: float, ssm_lr: float = 1e-3) -> list[dict]:
    """Split the trainable parameters of a model into groups for any torch optimiser.

    | group | parameters | learning rate | weight decay |
    |---|---|---|---|
    | "ssm" | step size and poles (log_dt, log_A_real, A_imag) | the smaller of `lr` and `ssm_lr` | 0 |
    | "no_decay" | C and D of the SSM, window biases, all vectors and scalars (biases, norms) | `lr` | 0 |
    | "decay" | everything else, the weight matrices | `lr` | `weight_decay` |

    C keeps the full rate: it is a readout like any linear layer. Biases, norms and window biases are not decayed:
    zero is no natural value for them. Shared parameters appear once; a parameter in several roles gets the first of
    the rows above. Empty groups are left out.

    Args:
        model: any module.
        lr: learning rate of ordinary parameters.
        weight_decay: decay of the weight matrices.
        ssm_lr: learning rate of step size and poles, default 1e-3.

    Returns:
        List of dicts with "name", "params", "lr" and "weight_decay".

    Raises:
        ValueError: a negative rate or decay.

    Example:
        >>> import torch, longvq_layers
        >>> groups = optimizer_groups(longvq_layers.S4DLayer(8), lr=3e-3, weight_decay=0.01)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('ssm', 0.001, 0.0), ('no_decay', 0.003, 0.0), ('decay', 0.003, 0.01)]
        >>> optimizer = torch.optim.AdamW(groups)

    Source: Gu et al. 2022 (arXiv 2206.11893), section 4, training details.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("ssm_lr", ssm_lr)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"optimizer_groups: {name} must be a finite number, at least 0, got {value}")
    members: dict[str, dict[int, nn.Parameter]] = {"ssm": {}, "no_decay": {}, "decay": {}}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            members[_role(module, name, parameter)][id(parameter)] = parameter
    rates = {"ssm": (min(lr, ssm_lr), 0.0), "no_decay": (lr, 0.0), "decay": (lr, weight_decay)}
    groups, taken = [], set()
    for name, (rate, decay) in rates.items():
        params = [p for key, p in members[name].items() if p.requires_grad and key not in taken]
        taken.update(members[name])
        if params:
            groups.append({"name": name, "params": params, "lr": rate, "weight_decay": decay})
    return groups


def _role(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if name in getattr(module, "slow_parameters", ()):
        return "ssm"
    if name in getattr(module, "no_decay_parameters", ()) or parameter.dim() < 2:
        return "no_decay"
    return "decay"
