"""The base class of `DiagonalSSM` and `DampedEMA`: checks, precision, and a scan in one or both directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers import ops
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.context import no_autocast
from longvq_layers.layers.common.precision import KeepsFloat32
from longvq_layers.layers.streaming import step_checks


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which inputs of `dtype` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ScanLayer(KeepsFloat32):
    """One linear recurrence per channel and mode, run by `ops.ssm_scan`, or by `ops.ssm_step` for one position."""

    channels: int
    causal: bool
    backend: str

    def _check_forward(
        self, u: Tensor, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None, needs_state: bool
    ) -> None:
        name = type(self).__name__
        check.tensor(name, "u", u, "B L H")
        check.real(name, "u", u)
        check.size(name, "u", u, (u.shape[0], u.shape[1], self.channels), "B L H")
        input_checks.padding(name, key_padding_mask, u)
        input_checks.packed(name, "u", u, cu_seqlens)
        if needs_state:
            step_checks.causal(name, self.causal)

    def _scan(
        self,
        u: Tensor,
        log_decay: Sequence[Tensor] | Tensor,
        weight: Sequence[Tensor] | Tensor,
        skip: Tensor,
        *,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        initial_state: Tensor | None,
        return_state: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`ops.ssm_scan` with the first decay and weight; plus, bidirectional, a reversed scan with the second ones."""
        with no_autocast(u.device):
            y, state = ops.ssm_scan(
                u,
                log_decay[0],
                weight[0],
                skip=skip,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
                initial_state=initial_state,
                return_state=True,
                backend=self.backend,
            )
            if not self.causal:
                y = y + ops.ssm_scan(  # type: ignore[operator]  # a tensor, because return_state is False
                    u,
                    log_decay[1],
                    weight[1],
                    reverse=True,
                    key_padding_mask=key_padding_mask,
                    cu_seqlens=cu_seqlens,
                    backend=self.backend,
                )
        return (y, state) if return_state else y
