"""Diagonal state space models by their definition, one position at a time; dense causal convolution.

Differentiable by autograd. O(L) steps, each with a state (B, H, N): slow, and exact up to rounding.
"""

import torch
from torch import Tensor

from longvq_layers.ops._scan_inputs import ScanInputs


def ssm_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """``x_t = exp(log_decay) ∘ x_{t−1} + u_t`` and ``y_t = Re Σ_n weight_n x_{t,n} + skip · u_t``: returns y and the
    last x.

    ``reverse`` runs from the last position to the first. Masked positions have input 0 and output 0.
    """
    u, log_decay, weight, skip, initial_state, key_padding_mask, cu_seqlens, reverse = inputs
    if cu_seqlens is not None:
        results = [(u[:, :0], log_decay.new_empty(0, *log_decay.shape))]  # the whole result if there are no documents
        results += [ssm_scan(document) for _, _, document in inputs.documents()]
        return torch.cat([y for y, _ in results], dim=1), torch.cat([state for _, state in results])
    x = u.to(log_decay.real.dtype)
    if key_padding_mask is not None:
        x = x.masked_fill(key_padding_mask.unsqueeze(-1), 0)
    batch, length, channels = u.shape
    state = log_decay.new_zeros(batch, channels, log_decay.shape[1]) if initial_state is None else initial_state
    decay = log_decay.exp()
    outputs = []
    for t in reversed(range(length)) if reverse else range(length):
        state = decay * state + x[:, t, :, None]
        y = (weight * state).sum(-1).real
        outputs.append(y if skip is None else y + skip * x[:, t])
    y = torch.stack(outputs[::-1] if reverse else outputs, dim=1) if outputs else x
    if not outputs:
        state = state.clone()  # the caller may overwrite the result, but not the initial state
    if key_padding_mask is not None:
        y = y.masked_fill(key_padding_mask.unsqueeze(-1), 0)
    return y.to(u.dtype), state


def ssm_step(u: Tensor, decay: Tensor, weight: Tensor, skip: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position of :func:`ssm_scan`: u (B, H), ``decay = exp(log_decay)``."""
    inputs = u.to(decay.real.dtype)
    state = decay * state + inputs.unsqueeze(-1)
    y = (weight * state).sum(-1).real
    return (y if skip is None else y + skip * inputs).to(u.dtype), state


def ssm_kernel(log_decay: Tensor, weight: Tensor, length: int) -> Tensor:
    """``K_l = Re Σ_n weight_n exp(log_decay_n · l)``, (H, length), from the full Vandermonde matrix (H, N, length)."""
    powers = torch.exp(log_decay.unsqueeze(-1) * torch.arange(length, device=log_decay.device))
    return (weight.unsqueeze(-1) * powers).sum(1).real


def long_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """``y_t = Σ_{l ≤ t} kernel_l u_{t−l}`` from the dense (H, L, L) Toeplitz matrix."""
    length, taps = u.shape[1], kernel.shape[1]
    kind = u.device.type if torch.amp.is_autocast_available(u.device.type) else "cpu"  # the meta device has no autocast
    with torch.autocast(kind, enabled=False):  # autocast would run the einsum in half precision
        precise = torch.promote_types(u.dtype, torch.float32)
        t = torch.arange(length, device=u.device)
        lag = t[:, None] - t[None, :]
        kernel = torch.nn.functional.pad(kernel.to(precise), (0, max(length - taps, 0)))
        toeplitz = kernel[:, lag.clamp(min=0)] * (lag >= 0)
        return torch.einsum("hts,bsh->bth", toeplitz, u.to(precise)).to(u.dtype)
