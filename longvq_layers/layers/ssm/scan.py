"""What `DiagonalSSM` and `DampedEMA` share: their checks, their precision, and a scan in one direction or both."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers import ops
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.context import no_autocast


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The precision for inputs of that dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(name: str, u: object, channels: int, key_padding_mask: object, cu_seqlens: object) -> None:
    """`u` is (B, L, channels) of any floating dtype, the others are None or belong to it."""
    check.tensor(name, "u", u, "B L H")
    check.real(name, "u", u)
    check.size(name, "u", u, (u.shape[0], u.shape[1], channels), "B L H")
    input_checks.padding(name, key_padding_mask, u)
    input_checks.packed(name, "u", u, cu_seqlens)


def scan(
    u: Tensor,
    log_decay: Sequence[Tensor],
    weight: Sequence[Tensor],
    skip: Tensor,
    *,
    initial_state: Tensor | None,
    return_state: bool,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.ssm_scan` with the first decay and weight; bidirectional if there is a second: added from the end on."""
    with no_autocast(u.device):
        y, state = ops.ssm_scan(
            u, log_decay[0], weight[0], skip=skip, initial_state=initial_state, return_state=True, **options
        )
        if len(weight) == 2:
            y = y + ops.ssm_scan(u, log_decay[1], weight[1], reverse=True, **options)
    return (y, state) if return_state else y
