"""Diagonal state space scan by chunks, forward and backward: matrix products, no H×N×L buffer, no FFT.

The sequence is split into chunks of T steps. With ``λ = exp(log_decay)`` and, per channel,

    K[l]    = Re Σ_n w_n λ_n^l            l < T     the kernel inside a chunk, as a lower triangular Toeplitz matrix
    V[t, n] = λ_n^{T−1−t}                           what input t of a chunk adds to the state at the chunk's end
    O[t, n] = w_n λ_n^{t+1}                         what the state before a chunk adds to output t

a chunk with inputs U and entry state X has the outputs ``Y = toeplitz(K) U + Re(O X)`` and the end state ``λ^T X + Vᵀ
U``. All chunks of a channel share the matrices, so each of the three products is one batched matmul. Only the
recurrence ``X ← λ^T X + S`` runs chunk after chunk. The last L mod T steps are one shorter chunk.

Powers of λ are computed in double precision, which is cheap because they are few. So decay over any length neither
overflows nor drifts.
"""

import torch
from torch import Tensor

from longvq_layers.ops._scan_inputs import ScanGradients, ScanInputs

_CHUNK = 64  # T in steps: work inside chunks grows with T, work on states with N / T


def double_precision(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The double precision of a real or complex dtype, where the device has double precision."""
    if device.type == "mps":
        return dtype
    return torch.complex128 if dtype.is_complex else torch.float64


def powers(log_decay: Tensor, count: int) -> Tensor:
    """(H, N) -> (count, H, N): ``exp(log_decay · l)`` for l < count. Each pass doubles the length of the table."""
    table = torch.ones_like(log_decay).unsqueeze(0)
    while table.shape[0] < count:
        table = torch.cat([table, table * torch.exp(log_decay * table.shape[0])])
    return table[:count]


def as_real(x: Tensor) -> Tensor:
    """A real view: complex (…, N) -> (…, 2N) with pairs of real and imaginary part; real tensors unchanged."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def as_modes(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`as_real`; complex if ``like`` is."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) if like.is_complex() else x


class Tables:
    """The matrices of chunks of ``steps`` steps, for all channels; ``dtype`` is the real dtype to compute in."""

    def __init__(self, log_decay: Tensor, weight: Tensor, steps: int, dtype: torch.dtype) -> None:
        precise = double_precision(log_decay.dtype, log_decay.device)
        self.steps, self.log_decay, self.weight = steps, log_decay.to(precise), weight.to(precise)
        self.powers = powers(self.log_decay, steps + 1)  # (T+1 H N)
        self.chunk_decay = self.powers[steps]  # λ^T (H N)
        kernel = (self.powers[:steps] * self.weight).sum(-1).real.t()  # (H T)
        t = torch.arange(steps, device=kernel.device)
        lag = t[:, None] - t[None, :]
        self.toeplitz = (kernel[:, lag.clamp(min=0)] * (lag >= 0)).to(dtype)  # (H T T): [h, t, s] = K[t − s]
        self.into_state = as_real(self.powers[:steps].flip(0).transpose(0, 1)).to(dtype)  # (H T 2N)
        # Re(O X) = Re O Re X − Im O Im X: with the conjugate of O this is one real product.
        self.out_modes = (self.powers[1:] * self.weight).transpose(0, 1)  # (H T N)
        self.from_state = as_real(self.out_modes.conj().resolve_conj()).to(dtype)  # (H T 2N)


def to_chunks(u: Tensor, steps: int) -> Tensor:
    """(B, C·T, H) -> (H, B·C, T), contiguous, because a batched matmul would copy each strided matrix separately."""
    batch, length, channels = u.shape
    return u.reshape(batch * (length // steps), steps, channels).permute(2, 0, 1).contiguous()


def from_chunks(chunks: Tensor, batch: int) -> Tensor:
    """(H, B·C, T) -> (B, C·T, H)."""
    return chunks.permute(1, 2, 0).reshape(batch, -1, chunks.shape[0])


def entry_states(added: Tensor, chunk_decay: Tensor, state: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Run ``X ← λ^T X + added_c`` over the chunks; returns X before each chunk (C, B, H, N) and the last X."""
    entry = torch.empty(added.shape, dtype=state.dtype, device=state.device)
    order = range(added.shape[0] - 1, -1, -1) if reverse else range(added.shape[0])
    for c in order:
        entry[c] = state
        state = chunk_decay * state + added[c]
    return entry, state


def states_of(chunks: Tensor, tables: Tables, batch: int) -> Tensor:
    """(H, B·C, T) -> (C, B, H, N): what each chunk adds to the state."""
    added = as_modes(chunks @ tables.into_state, tables.log_decay)  # (H B·C N)
    return added.unflatten(1, (batch, -1)).permute(2, 1, 0, 3)


def by_channel(states: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, B, H, N) -> (H, B·C, 2N) real."""
    channels = states.shape[2]
    return as_real(states.permute(2, 1, 0, 3).reshape(channels, -1, states.shape[3])).to(dtype)


def pieces(length: int) -> list[tuple[slice, int]]:
    """The ranges of a sequence with their chunk length: all full chunks, then the shorter rest."""
    whole = length - length % _CHUNK
    parts = [(slice(0, whole), _CHUNK), (slice(whole, length), length - whole)]
    return [(part, steps) for part, steps in parts if part.start < part.stop]


def to_scan_order(u: Tensor, key_padding_mask: Tensor | None, reverse: bool) -> Tensor:
    """(B, L, H) with zeros at masked positions, flipped along L if ``reverse``."""
    u = u if key_padding_mask is None else u.masked_fill(key_padding_mask.unsqueeze(-1), 0)
    return u.flip(1) if reverse else u


def from_scan_order(y: Tensor, key_padding_mask: Tensor | None, reverse: bool) -> Tensor:
    """The inverse of :func:`to_scan_order`, with zeros at masked positions."""
    y = y.flip(1) if reverse else y
    return y if key_padding_mask is None else y.masked_fill(key_padding_mask.unsqueeze(-1), 0)


def ssm_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, H) in the dtype of ``u`` and the last state (B, H, N) in the dtype of ``log_decay``."""
    u, log_decay, weight, skip, initial_state, key_padding_mask, _, reverse = inputs
    with torch.autocast(u.device.type, enabled=False):
        dtype, batch = log_decay.real.dtype, u.shape[0]
        u = to_scan_order(u, key_padding_mask, reverse)
        state = _start(u, log_decay, initial_state)
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        if u.numel() == 0:
            return y, state.to(log_decay.dtype, copy=True).contiguous()  # never an alias of initial_state
        for part, steps in pieces(u.shape[1]):
            tables = Tables(log_decay, weight, steps, dtype)
            chunks = to_chunks(u[:, part].to(dtype), steps)
            entry, state = entry_states(states_of(chunks, tables, batch), tables.chunk_decay, state)
            out = chunks @ tables.toeplitz.transpose(1, 2)
            out += by_channel(entry, dtype) @ tables.from_state.transpose(1, 2)
            y_part = from_chunks(out, batch)
            y[:, part] = y_part if skip is None else y_part + skip * u[:, part]
        return from_scan_order(y, key_padding_mask, reverse), state.to(log_decay.dtype).contiguous()


def _start(u: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> Tensor:
    precise = double_precision(log_decay.dtype, u.device)
    if initial_state is not None:
        return initial_state.to(precise)
    return torch.zeros(u.shape[0], *log_decay.shape, dtype=precise, device=u.device)


def ssm_scan_backward(
    grad_y: Tensor, grad_state: Tensor, inputs: ScanInputs, need_inputs: bool, need_parameters: bool
) -> ScanGradients:
    """Gradients of u, log_decay, weight, skip and initial_state.

    The gradient of an absent argument is an empty tensor. So are those of u and initial_state without ``need_inputs``,
    and those of the others without ``need_parameters``.

    ``beta`` is the holomorphic derivative dL/dX. PyTorch defines the gradient of a complex tensor as the conjugate of
    this derivative. The states are recomputed chunk by chunk. The adjoint is the same recurrence, run backwards over
    the chunks.
    """
    u, log_decay, weight, skip, initial_state, key_padding_mask, _, reverse = inputs
    with torch.autocast(u.device.type, enabled=False):
        dtype, batch = log_decay.real.dtype, u.shape[0]
        u, grad_y = (to_scan_order(x, key_padding_mask, reverse) for x in (u, grad_y))
        beta = grad_state.to(double_precision(log_decay.dtype, u.device)).conj().resolve_conj()
        du = torch.zeros(u.shape, dtype=u.dtype, device=u.device)
        dlog, dweight = (beta.new_zeros(log_decay.shape) for _ in range(2))
        dskip = log_decay.new_zeros(0 if skip is None else skip.shape, dtype=dtype)
        if u.numel():
            state, starts = _start(u, log_decay, initial_state), []
            parts = [(part, Tables(log_decay, weight, steps, dtype)) for part, steps in pieces(u.shape[1])]
            for part, tables in parts:
                added = states_of(to_chunks(u[:, part].to(dtype), tables.steps), tables, batch)
                entry, state = entry_states(added, tables.chunk_decay, state)
                starts.append(by_channel(entry, dtype))
            for (part, tables), entry in zip(reversed(parts), reversed(starts), strict=True):
                u_part, dy = u[:, part].to(dtype), grad_y[:, part].to(dtype)
                chunks, dy_chunks = to_chunks(u_part, tables.steps), to_chunks(dy, tables.steps)
                # dL/dX of each chunk's entry state: through the outputs of the chunk and through its end state.
                through_out = as_modes(dy_chunks @ _conj(tables.from_state, log_decay), log_decay)
                through_out = through_out.unflatten(1, (batch, -1)).permute(2, 1, 0, 3)
                end_grad, beta = entry_states(through_out, tables.chunk_decay, beta, reverse=True)
                d_end = by_channel(end_grad, dtype)  # (H B·C 2N): dL/d(state at the chunk's end)
                d_chunks = dy_chunks @ tables.toeplitz
                d_chunks += _conj(d_end, log_decay) @ tables.into_state.transpose(1, 2)
                d_part = from_chunks(d_chunks, batch)
                du[:, part] = d_part if skip is None else d_part + skip * dy
                if skip is not None:
                    dskip += (dy * u_part).sum((0, 1))
                if need_parameters:
                    _parameter_grads(dlog, dweight, tables, chunks, dy_chunks, entry, d_end)
        dlog, dweight = (x.conj().resolve_conj().to(log_decay.dtype) for x in (dlog, dweight))
        dinitial = log_decay.new_empty(0)
        if initial_state is not None and need_inputs:
            dinitial = beta.conj().resolve_conj().to(initial_state.dtype).contiguous()
        du = from_scan_order(du, key_padding_mask, reverse) if need_inputs else u.new_empty(0)
        if not need_parameters:
            dlog, dweight, dskip = (x.new_empty(0) for x in (dlog, dweight, dskip))
        return ScanGradients(du, dlog, dweight, dskip, dinitial)


def _conj(x: Tensor, like: Tensor) -> Tensor:
    """The conjugate of modes in their real view (…, 2N); real modes are returned as they are."""
    if not like.is_complex():
        return x
    return x * torch.tensor([1.0, -1.0], dtype=x.dtype, device=x.device).repeat(x.shape[-1] // 2)


def _parameter_grads(
    dlog: Tensor, dweight: Tensor, tables: Tables, chunks: Tensor, dy: Tensor, entry: Tensor, d_end: Tensor
) -> None:
    """Add the gradients of log_decay and weight to ``dlog`` and ``dweight``, through K, O, V and λ^T."""
    steps, precise = tables.steps, tables.log_decay.dtype
    time = torch.arange(steps + 1, device=dlog.device, dtype=dlog.real.dtype)[:, None, None]

    # Through K: dK[l] sums the products of output gradients and the inputs l steps earlier.
    products = (dy.transpose(1, 2) @ chunks).to(dlog.real.dtype)  # (H T T): [h, t, s]
    dkernel = torch.stack([products.diagonal(-lag, 1, 2).sum(-1) for lag in range(steps)]).unsqueeze(-1)  # (T H 1)
    through = dkernel * tables.powers[:steps]
    dweight += through.sum(0)
    dlog += tables.weight * (time[:steps] * through).sum(0)

    # Through O: output gradients times entry states.
    d_out = as_modes(dy.transpose(1, 2) @ entry, dlog).to(precise).transpose(0, 1)  # (T H N)
    through = d_out * tables.powers[1:]
    dweight += through.sum(0)
    dlog += tables.weight * (time[1:] * through).sum(0)

    # Through V: inputs times gradients of end states.
    d_into = as_modes(chunks.transpose(1, 2) @ d_end, dlog).to(precise).transpose(0, 1)
    dlog += (time[:steps].flip(0) * tables.powers[:steps].flip(0) * d_into).sum(0)

    # Through λ^T: entry states times gradients of end states.
    dlog += steps * tables.chunk_decay * (as_modes(d_end, dlog).to(precise) * as_modes(entry, dlog)).sum(1)


def ssm_kernel(log_decay: Tensor, weight: Tensor, length: int) -> Tensor:
    """The kernel (H, length), from two short tables of powers: ``λ^{cT + t} = λ^{cT} λ^t``. Differentiable."""
    with torch.autocast(log_decay.device.type, enabled=False):
        precise = double_precision(log_decay.dtype, log_decay.device)
        log, steps = log_decay.to(precise), max(1, round(length**0.5))
        fine = powers(log, steps)  # (T H N)
        coarse = powers(log * steps, -(-length // steps)) * weight.to(precise)  # (C H N)
        fine = as_real(fine.conj().resolve_conj().transpose(0, 1))  # (H T 2N), conjugate as above
        kernel = as_real(coarse.transpose(0, 1)) @ fine.transpose(1, 2)  # (H C T)
        return kernel.flatten(1)[:, :length].to(log_decay.real.dtype)
