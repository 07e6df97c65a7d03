"""One step of a diagonal state space model, and its backward."""

import torch
from torch import Tensor


def ssm_step(u: Tensor, decay: Tensor, weight: Tensor, skip: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y (B, H) in the dtype of ``u`` and the new state (B, H, N) in the dtype of ``state``."""
    with torch.autocast(u.device.type, enabled=False):
        inputs = u.to(decay.real.dtype)
        state = torch.addcmul(inputs.unsqueeze(-1), decay, state).contiguous()
        y = (weight * state).sum(-1).real
        return (y if skip is None else torch.addcmul(y, skip, inputs)).to(u.dtype), state


def ssm_step_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    decay: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    state: Tensor,
    new_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of the arguments of :func:`ssm_step`; complex gradients are conjugates, the convention of PyTorch."""
    with torch.autocast(u.device.type, enabled=False):
        dtype = decay.real.dtype
        dy = grad_y.to(dtype)
        dstate = grad_state + dy.unsqueeze(-1) * weight.conj()  # of the new state
        du = dstate.sum(-1).real
        dskip = None
        if skip is not None:
            du, dskip = du + skip * dy, (dy * u.to(dtype)).sum(0)
        ddecay = (dstate * state.conj()).sum(0)
        dweight = (dy.unsqueeze(-1) * new_state.conj()).sum(0)
        return du.to(u.dtype), ddecay, dweight, dskip, dstate * decay.conj()
