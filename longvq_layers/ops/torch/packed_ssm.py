"""The scan of documents packed into one row: one document after the other, each from its own initial state."""

import torch
from torch import Tensor

from longvq_layers.ops._scan_inputs import ScanGradients, ScanInputs
from longvq_layers.ops.torch import ssm


def ssm_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, H) and the last states (B, H, N), or (documents, H, N) with ``cu_seqlens``."""
    if inputs.cu_seqlens is None:
        return ssm.ssm_scan(inputs)
    y = inputs.u.new_empty(inputs.u.shape)
    states = inputs.log_decay.new_empty(inputs.cu_seqlens.shape[0] - 1, *inputs.log_decay.shape)
    for n, at, document in inputs.documents():
        y[:, at], states[n : n + 1] = ssm.ssm_scan(document)
    return y, states


def ssm_scan_backward(
    grad_y: Tensor, grad_state: Tensor, inputs: ScanInputs, need_inputs: bool, need_parameters: bool
) -> ScanGradients:
    """As :func:`longvq_layers.ops.torch.ssm.ssm_scan_backward`. Gradients of parameters are summed over documents."""
    if inputs.cu_seqlens is None:
        return ssm.ssm_scan_backward(grad_y, grad_state, inputs, need_inputs, need_parameters)
    u, log_decay, weight, skip, initial_state = inputs[:5]
    family, real = log_decay.dtype, log_decay.real.dtype
    du = u.new_empty(u.shape if need_inputs else 0)
    dinitial = log_decay.new_empty(0)
    if need_inputs and initial_state is not None:
        dinitial = log_decay.new_empty(initial_state.shape)

    def zeros(x: Tensor | None, dtype: torch.dtype) -> Tensor:
        # In double precision, because the sum may run over many documents.
        sizes = x.shape if need_parameters and x is not None else (0,)
        return log_decay.new_zeros(sizes, dtype=ssm.double_precision(dtype, u.device))

    dlog, dweight, dskip = zeros(log_decay, family), zeros(weight, family), zeros(skip, real)
    for n, at, document in inputs.documents():
        own = slice(n, n + 1)
        of_document = ssm.ssm_scan_backward(grad_y[:, at], grad_state[own], document, need_inputs, need_parameters)
        if need_inputs:
            du[:, at] = of_document.u
        if dinitial.numel():
            dinitial[own] = of_document.initial_state
        dlog += of_document.log_decay
        dweight += of_document.weight
        dskip += of_document.skip
    return ScanGradients(du, dlog.to(family), dweight.to(family), dskip.to(real), dinitial)
