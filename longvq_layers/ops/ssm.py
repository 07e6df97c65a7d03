"""Diagonal state space models and long convolutions: the public functions, their checks, the choice of the backend."""

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.ops import _cuda_limits as cuda
from longvq_layers.ops import _schema  # noqa: F401  defines the operators
from longvq_layers.ops._dispatch import choose, refuse_forward_mode
from longvq_layers.ops._scan_inputs import ScanInputs
from longvq_layers.ops.reference import ssm as reference
from longvq_layers.ops.torch.conv import long_conv as _torch_conv
from longvq_layers.ops.torch.ssm import ssm_kernel as _torch_kernel

_NAMESPACE = {"native": torch.ops.longvq, "torch": torch.ops.longvq_torch}


def ssm_scan(
    u: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    *,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """A diagonal linear recurrence with readout: one state space model per channel.

    ``x_t = exp(log_decay) ∘ x_{t−1} + u_t`` and ``y_t = Re Σ_n weight_n x_{t,n} + skip · u_t``. This equals
    ``long_conv(u, ssm_kernel(log_decay, weight, L)) + skip * u``. A sequence may be split anywhere: calls that pass the
    state on give the result of one call.

    Args:
        u: inputs (B, L, H), floating point, any strides.
        log_decay: (H, N) logarithm of each mode's decay per step, complex or real, real part ≤ 0: float32 or complex64,
            with float64 ``u`` float64 or complex128. The state and the arithmetic have the same precision.
        weight: (H, N), dtype of ``log_decay``. If a mode represents a conjugate pair, its weight includes the factor 2.
        skip: (H,), the real dtype of ``log_decay``. Default none.
        initial_state: x_{−1}, (B, H, N), dtype of ``log_decay``; with ``cu_seqlens`` one per document, (documents, H,
            N). Default zero.
        return_state: also return the last state. Default False.
        key_padding_mask: (B, L) bool, True = the input counts as 0 and the output is 0. The state still decays at these
            positions. Default none.
        cu_seqlens: (documents + 1,) int32, offsets of documents packed into one row (B = 1), ascending from 0 to L.
            Document n has the positions ``cu_seqlens[n] ≤ t < cu_seqlens[n + 1]`` and starts from its own initial
            state. Default none.
        reverse: run from the last position to the first, as if ``u`` and ``y`` were flipped along L. ``initial_state``
            is then x_L, after the last position, and the returned state is x_0. Default False.
        backend: ``"auto"`` (default), ``"native"``, ``"torch"`` or ``"reference"`` (step by step).

    Returns:
        y (B, L, H) in the dtype of ``u``; with ``return_state`` also x_{L−1} (``reverse``: x_0), (B, H, N) in the
        dtype of ``log_decay``; with ``cu_seqlens`` the last state of each document, (documents, H, N).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        NotImplementedError: ``backend="native"`` has no kernel for these arguments; the message has the reason.

    Example:
        >>> u, decay = torch.ones(1, 3, 1), torch.log(torch.tensor([[0.5]]))
        >>> ssm_scan(u, decay, torch.ones(1, 1)).flatten()
        tensor([1.0000, 1.5000, 1.7500])

    Source: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models"
    (arXiv 2206.11893), eq. 4; Mega's EMA (arXiv 2209.10655), eq. 4, is the real case.
    """
    op = "ssm_scan"
    check.tensor(op, "u", u, "B L H")
    check.real(op, "u", u)
    _check_modes(op, log_decay, weight)
    _check_belongs(op, u, "log_decay", log_decay, skip)
    if cu_seqlens is not None:
        check.cu_seqlens(op, "u", u, cu_seqlens)
    if initial_state is not None:
        rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_state(op, "initial_state", initial_state, rows, "log_decay", log_decay)
    if key_padding_mask is not None:
        check.key_padding_mask(op, key_padding_mask, u.shape[0], u.shape[1])
    check.flags(op, reverse=reverse)
    check.same_device(
        op,
        "u",
        u,
        log_decay=log_decay,
        weight=weight,
        skip=skip,
        initial_state=initial_state,
        key_padding_mask=key_padding_mask,
    )

    chosen = choose(op, backend, u.device, (u.dtype,), lambda: cuda.scan(u, log_decay.shape[1], cu_seqlens))
    if chosen != "reference":
        refuse_forward_mode(op, u, log_decay, weight, skip, initial_state)
    inputs = ScanInputs(u, log_decay, weight, skip, initial_state, key_padding_mask, cu_seqlens, reverse)
    y, state = reference.ssm_scan(inputs) if chosen == "reference" else _NAMESPACE[chosen].ssm_scan(*inputs)
    return (y, state) if return_state else y


def ssm_step(
    u: Tensor,
    decay: Tensor,
    weight: Tensor,
    state: Tensor,
    *,
    skip: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One position of :func:`ssm_scan`, for generation. Takes constant time and memory and computes no exponentials.

    Args:
        u: inputs of one position (B, H), floating point.
        decay: (H, N) ``exp(log_decay)``, complex or real, absolute value at most 1, dtype as in :func:`ssm_scan`.
        weight: (H, N), dtype of ``decay``.
        state: x_{t−1}, (B, H, N), dtype of ``decay``; not modified.
        skip: (H,), the real dtype of ``decay``. Default none.
        backend: ``"auto"`` (default), ``"native"``, ``"torch"`` or ``"reference"``.

    Returns:
        y (B, H) in the dtype of ``u`` and the new state x_t (B, H, N).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.
        NotImplementedError: ``backend="native"`` has no kernel for these arguments; the message has the reason.

    Example:
        >>> y, state = ssm_step(torch.ones(1, 1), torch.full((1, 1), 0.5), torch.ones(1, 1), torch.ones(1, 1, 1))
        >>> y.item()
        1.5

    Source: as :func:`ssm_scan`.
    """
    op = "ssm_step"
    if not _is_common_step(u, decay, weight, state, skip):
        check.tensor(op, "u", u, "B H")
        check.real(op, "u", u)
        _check_modes(op, decay, weight, "decay")
        _check_belongs(op, u, "decay", decay, skip)
        _check_state(op, "state", state, u.shape[0], "decay", decay)
        check.same_device(op, "u", u, decay=decay, weight=weight, skip=skip, state=state)
    chosen = choose(op, backend, u.device, (u.dtype,))
    if chosen != "reference":
        refuse_forward_mode(op, u, decay, weight, skip, state)
    call = reference.ssm_step if chosen == "reference" else _NAMESPACE[chosen].ssm_step
    return call(u, decay, weight, skip, state)


def ssm_kernel(log_decay: Tensor, weight: Tensor, length: int, *, backend: str = "auto") -> Tensor:
    """The impulse response of :func:`ssm_scan`, ``K_l = Re Σ_n weight_n exp(log_decay_n · l)`` for ``0 ≤ l < length``.

    Args:
        log_decay: (H, N) complex or real, real part ≤ 0.
        weight: (H, N), dtype of ``log_decay``.
        length: number of taps, at least 0.
        backend: ``"auto"`` (default), ``"torch"`` or ``"reference"`` (the full Vandermonde matrix).

    Returns:
        (H, length) in the real dtype of ``log_decay``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        NotImplementedError: ``backend="native"``, which has no compiled kernel for this operator.

    Example:
        >>> ssm_kernel(torch.log(torch.tensor([[0.5]])), torch.ones(1, 1), 3)
        tensor([[1.0000, 0.5000, 0.2500]])

    Source: arXiv 2206.11893, eq. 5.
    """
    op = "ssm_kernel"
    _check_modes(op, log_decay, weight)
    check.same_device(op, "log_decay", log_decay, weight=weight)
    check.integer(op, "length", length, 0)
    chosen = choose(op, backend, log_decay.device, (log_decay.dtype,))
    return (reference.ssm_kernel if chosen == "reference" else _torch_kernel)(log_decay, weight, length)


def long_conv(u: Tensor, kernel: Tensor, *, backend: str = "auto") -> Tensor:
    """Causal convolution of each channel with its own kernel, ``y_t = Σ_{l ≤ t} kernel_l u_{t−l}``, by FFT.

    Args:
        u: inputs (B, L, H), floating point.
        kernel: (H, K) floating point, any K ≥ 0; taps beyond L have no effect.
        backend: ``"auto"`` (default), ``"torch"`` or ``"reference"`` (dense, O(L²)).

    Returns:
        (B, L, H) in the dtype of ``u``. Half types are computed in float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.
        NotImplementedError: ``backend="native"``, which has no compiled kernel for this operator.

    Example:
        >>> long_conv(torch.ones(1, 3, 1), torch.tensor([[1.0, 0.5]])).flatten()
        tensor([1.0000, 1.5000, 1.5000])
    """
    op = "long_conv"
    check.tensor(op, "u", u, "B L H")
    check.tensor(op, "kernel", kernel, "H K")
    check.real(op, "u", u)
    check.real(op, "kernel", kernel)
    if kernel.shape[0] != u.shape[2]:
        raise ValueError(
            f"{op}: kernel must have shape (H, K) with the H = {u.shape[2]} of u, got {tuple(kernel.shape)}"
        )
    check.same_device(op, "u", u, kernel=kernel)
    chosen = choose(op, backend, u.device, (u.dtype,))
    return (reference.long_conv if chosen == "reference" else _torch_conv)(u, kernel)


def _real_dtype(x: Tensor) -> torch.dtype:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(x.dtype, x.dtype)


def _check_modes(op: str, log_decay: Tensor, weight: Tensor, name: str = "log_decay") -> None:
    check.tensor(op, name, log_decay, "H N")
    check.tensor(op, "weight", weight, "H N")
    if _real_dtype(log_decay) not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: {name} must be float32, float64, complex64 or complex128, got {log_decay.dtype}; half "
            "precision can't represent decays close to 1"
        )
    check.same_dtype(op, name, log_decay.dtype, weight=weight)
    check.size(op, "weight", weight, tuple(log_decay.shape), "H N")
    check.at_least_one(op, name, log_decay, 1, "mode N")
    if name == "log_decay" and check.values_are_readable(log_decay) and log_decay.numel():
        worst = float(log_decay.detach().real.max())
        if not worst <= 0:  # also for NaN
            raise ValueError(f"{op}: log_decay must have a real part ≤ 0 (a stable decay), got up to {worst:g}")


def _is_common_step(u: Tensor, decay: Tensor, weight: Tensor, state: Tensor, skip: Tensor | None) -> bool:
    """Whether the call is valid and has the form that generation uses for every token; then no check is needed."""
    try:
        modes, device = decay.shape, u.device
        return (
            skip is not None
            and u.dtype is torch.float32
            and skip.dtype is torch.float32
            and decay.dtype is torch.complex64
            and weight.dtype is torch.complex64
            and state.dtype is torch.complex64
            and len(modes) == 2
            and modes[1] > 0
            and weight.shape == modes
            and state.shape == (*u.shape[:1], *modes)
            and u.shape[1:] == skip.shape == modes[:1]
            and decay.device == weight.device == state.device == skip.device == device
        )
    except AttributeError:  # an argument is no tensor
        return False


def _check_belongs(op: str, u: Tensor, name: str, decay: Tensor, skip: Tensor | None) -> None:
    """``decay`` and ``skip`` have the H channels of ``u`` (…, H), and its precision or float32."""
    expected = torch.float64 if u.dtype == torch.float64 else torch.float32
    if _real_dtype(decay) != expected:
        raise TypeError(
            f"{op}: {name} must be {expected} or its complex counterpart for u of {u.dtype}, got {decay.dtype}"
        )
    if decay.shape[0] != u.shape[-1]:
        raise ValueError(
            f"{op}: {name} must have shape (H, N) with the H = {u.shape[-1]} of u, got {tuple(decay.shape)}"
        )
    if skip is not None:
        check.tensor(op, "skip", skip, "H")
        check.size(op, "skip", skip, (u.shape[-1],), "H")
        if skip.dtype != expected:
            raise TypeError(f"{op}: skip must be {expected}, the real dtype of {name}, got {skip.dtype}")


def _check_state(op: str, name: str, state: Tensor, rows: int, decay_name: str, decay: Tensor) -> None:
    check.tensor(op, name, state, "B H N")
    check.size(op, name, state, (rows, *decay.shape), "B H N")
    check.same_dtype(op, decay_name, decay.dtype, **{name: state})
