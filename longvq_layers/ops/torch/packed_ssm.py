"""The scan of documents packed into one row: one document after the other, each from its own initial state."""

import torch
from torch import Tensor

from longvq_layers.ops._packed import documents, part
from longvq_layers.ops.torch import ssm


def ssm_scan(
    u: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, L, H) and the last states (B, H, N), or (documents, H, N) with ``cu_seqlens``."""
    if cu_seqlens is None:
        return ssm.ssm_scan(u, log_decay, weight, skip, initial_state, key_padding_mask, reverse)
    y = u.new_empty(u.shape)
    states = log_decay.new_empty(cu_seqlens.shape[0] - 1, *log_decay.shape)
    for n, at in enumerate(documents("ssm_scan", cu_seqlens, u.shape[1])):
        start, mask = part(initial_state, slice(n, n + 1), 0), part(key_padding_mask, at, 1)
        y[:, at], states[n : n + 1] = ssm.ssm_scan(u[:, at], log_decay, weight, skip, start, mask, reverse)
    return y, states


def ssm_scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    need_inputs: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`longvq_layers.ops.torch.ssm.ssm_scan_backward`. Gradients of parameters are summed over documents."""
    model, needed = (log_decay, weight, skip), (reverse, need_inputs, need_parameters)
    if cu_seqlens is None:
        return ssm.ssm_scan_backward(grad_y, grad_state, u, *model, initial_state, key_padding_mask, *needed)
    du = u.new_empty(u.shape if need_inputs else 0)
    dinitial = log_decay.new_empty(0)
    if need_inputs and initial_state is not None:
        dinitial = log_decay.new_empty(initial_state.shape)

    def zeros(x: Tensor | None, dtype: torch.dtype) -> Tensor:
        # In double precision, because there may be many documents.
        return log_decay.new_zeros(
            x.shape if need_parameters and x is not None else 0, dtype=ssm.double_precision(dtype, u.device)
        )

    real = log_decay.real.dtype
    dlog, dweight, dskip = zeros(log_decay, log_decay.dtype), zeros(weight, log_decay.dtype), zeros(skip, real)
    for n, at in enumerate(documents("ssm_scan", cu_seqlens, u.shape[1])):
        own = slice(n, n + 1)
        start, mask = part(initial_state, own, 0), part(key_padding_mask, at, 1)
        du_part, dlog_part, dweight_part, dskip_part, dinitial_part = ssm.ssm_scan_backward(
            grad_y[:, at], grad_state[own], u[:, at], *model, start, mask, *needed
        )
        if need_inputs:
            du[:, at] = du_part
        if dinitial.numel():
            dinitial[own] = dinitial_part
        dlog += dlog_part
        dweight += dweight_part
        dskip += dskip_part
    return du, dlog.to(log_decay.dtype), dweight.to(log_decay.dtype), dskip.to(real), dinitial
