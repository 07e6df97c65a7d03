"""Optimiser groups: the parameters of a state space model learn slowly and are not decayed."""

from collections.abc import Mapping

from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.ssm.diagonal import TRAINABLE

_SSM_LR = 1e-3


def optimizer_groups(
    model: nn.Module, *, lr: float, weight_decay: float, ssm_lr: float | Mapping[str, float] = _SSM_LR
) -> list[dict]:
    """Split the trainable parameters of a model into groups for any torch optimiser.

    | group | parameters | learning rate | weight decay |
    |---|---|---|---|
    | "ssm" | step size, poles and input of the SSM (Δ, A, B) | the smaller of `lr` and `ssm_lr` | 0 |
    | "no_decay" | C and D of the SSM, window biases, all vectors and scalars (biases, norms) | `lr` | 0 |
    | "decay" | everything else, the weight matrices | `lr` | `weight_decay` |

    With a mapping for `ssm_lr` there are "ssm_A" (log_A_real, A_imag), "ssm_B" (B) and "ssm_dt" (log_dt) instead of
    "ssm". C keeps the full rate: it is a readout like any linear layer. Biases, norms and window biases are not
    decayed: zero is no natural value for them. Shared parameters appear once; a parameter in several roles gets the
    first of the rows above. Empty groups are left out.

    Args:
        model: any module.
        lr: learning rate of ordinary parameters.
        weight_decay: decay of the weight matrices.
        ssm_lr: learning rate of step size, poles and input, default 1e-3; or a mapping with a rate for each of "A",
            "B" and "dt", 1e-3 for those it lacks. To train one of them not at all, leave it out of the layer's
            `trained`.

    Returns:
        List of dicts with "name", "params", "lr" and "weight_decay".

    Raises:
        ValueError: a negative rate or decay, an unknown name in `ssm_lr`.
        TypeError: a rate or decay that is neither a number nor a tensor with one element.

    Example:
        >>> import torch, longvq_layers
        >>> groups = optimizer_groups(longvq_layers.S4DLayer(8), lr=3e-3, weight_decay=0.01)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('ssm', 0.001, 0.0), ('no_decay', 0.003, 0.0), ('decay', 0.003, 0.01)]
        >>> optimizer = torch.optim.AdamW(groups)

    Source: Gu et al. 2022 (arXiv 2206.11893), section 4, training details.
    """
    split = isinstance(ssm_lr, Mapping)
    unknown = [kind for kind in ssm_lr if kind not in TRAINABLE] if split else []
    if unknown:
        raise ValueError(
            f"optimizer_groups: ssm_lr must name rates of {', '.join(map(repr, TRAINABLE))}, got {unknown}"
        )
    slow = {f"ssm_{kind}": ssm_lr.get(kind, _SSM_LR) for kind in TRAINABLE} if split else {"ssm": ssm_lr}
    given = {f"ssm_lr[{kind!r}]": rate for kind, rate in ssm_lr.items()} if split else {"ssm_lr": ssm_lr}
    for name, value in {"lr": lr, "weight_decay": weight_decay, **given}.items():
        if not (isinstance(value, Tensor) and value.numel() == 1):  # torch's optimisers take those as well
            check.number("optimizer_groups", name, value)
        if not 0 <= value < float("inf"):
            raise ValueError(f"optimizer_groups: {name} must be a finite number, at least 0, got {value}")
    settings = {name: (min(lr, rate), 0.0) for name, rate in slow.items()}
    settings |= {"no_decay": (lr, 0.0), "decay": (lr, weight_decay)}
    members: dict[str, dict[int, nn.Parameter]] = {name: {} for name in settings}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            members[_role(module, name, parameter, split)][id(parameter)] = parameter
    groups, taken = [], set()
    for name, (rate, decay) in settings.items():
        params = [p for key, p in members[name].items() if p.requires_grad and key not in taken]
        taken.update(members[name])
        if params:
            groups.append({"name": name, "params": params, "lr": rate, "weight_decay": decay})
    return groups


def _role(module: nn.Module, name: str, parameter: nn.Parameter, split: bool) -> str:
    slow = getattr(module, "slow_parameters", {})  # parameter name -> "A", "B" or "dt"
    if name in slow:
        return f"ssm_{slow[name]}" if split else "ssm"
    if name in getattr(module, "no_decay_parameters", ()) or parameter.dim() < 2:
        return "no_decay"
    return "decay"
