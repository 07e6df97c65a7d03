"""Which backend serves a call, and why the native one declines.

``"reference"`` and ``"torch"`` serve every call. ``"native"`` serves the operators, device types and dtypes listed in
:data:`NATIVE_KERNELS`. ``"auto"`` chooses native where native serves the call, otherwise torch. A backend that the user
names is never replaced by another one.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longvq_layers import _checks as check
from longvq_layers import _extension

BACKENDS = ("auto", "native", "torch", "reference")

_HALVES_TOO = (torch.float32, torch.bfloat16, torch.float16)

# operator -> device type -> dtypes of the compiled kernels
NATIVE_KERNELS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "vq_assign": {"cpu": _HALVES_TOO, "cuda": _HALVES_TOO},
    "vq_attention": {"cpu": _HALVES_TOO, "cuda": _HALVES_TOO},
    "vq_attention_step": {"cpu": _HALVES_TOO},
    "ssm_scan": {"cpu": _HALVES_TOO, "cuda": _HALVES_TOO},
    "ssm_step": {"cpu": _HALVES_TOO},
    "ssm_kernel": {},
    "long_conv": {},
}

# Device types whose kernels have not been tested on such a device. "auto" never chooses these kernels; backend="native"
# uses them with a warning.
UNPROVEN = ("cuda",)


def native_declines(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The reason why the compiled library can't serve this call; None if it can."""
    kernels = NATIVE_KERNELS.get(op, {})
    if not kernels:
        return f"{op} has no compiled kernel yet"
    if device.type not in kernels:
        return f"{op} has compiled kernels for {', '.join(kernels)}, not for {device.type}"
    covered = kernels[device.type]
    wrong = [dtype for dtype in dtypes if dtype not in covered]
    if wrong:
        names = ", ".join(str(dtype) for dtype in covered)
        return f"{op} on {device.type} has compiled kernels for {names}, got {', '.join(str(d) for d in wrong)}"
    if device.type == "cuda" and not _extension.cuda_is_loaded():
        return f"the library of the CUDA kernels is not loaded: {_extension.cuda_load_error()}"
    if not _extension.is_loaded():
        return f"the compiled library is not loaded: {_extension.load_error()}"
    return None


def choose(
    op: str,
    backend: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    cuda_declines: Callable[[], str | None] = lambda: None,
) -> str:
    """Resolve ``backend`` to ``"native"``, ``"torch"`` or ``"reference"``.

    ``cuda_declines`` returns the reason why the CUDA kernels don't take arguments of these sizes, or None. It is only
    called for tensors on a GPU.

    Raises:
        ValueError: ``backend`` is none of the four names.
        NotImplementedError: ``backend="native"`` and no compiled kernel serves these arguments; the message has the
            reason.
    """
    check.one_of(op, "backend", backend, BACKENDS)
    if backend in ("torch", "reference"):
        return backend
    unproven = device.type in UNPROVEN
    if unproven and backend == "auto":
        return "torch"
    reason = native_declines(op, device, dtypes)
    if reason is None and device.type == "cuda":
        reason = cuda_declines()
    if reason is None:
        if unproven:
            warnings.warn(
                f'{op}: backend="native" on {device.type}: these kernels have only been tested on the CPU, thread by '
                f'thread, never on a GPU; compare their results with backend="torch"',
                RuntimeWarning,
                stacklevel=3,
            )
        return "native"
    if backend == "native":
        raise NotImplementedError(
            f'{op}: backend="native" can\'t serve this call: {reason}. '
            'Use backend="auto" or "torch"; `python -m longvq_layers.info` shows what is available.'
        )
    return "torch"


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError if one of the tensors carries a forward-mode tangent; only the reference serves these.

    An operator defined through ``torch.library`` drops tangents silently when no argument requires a gradient.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f'{op}: forward-mode derivatives are not supported; use backend="reference"')


def availability() -> list[tuple[str, str, str, dict[str, str | None]]]:
    """Rows (operator, device type, dtype, {backend: None if available, else the reason}) for this machine."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    rows: list[tuple[str, str, str, dict[str, str | None]]] = []
    for op in NATIVE_KERNELS:
        for device in devices:
            for dtype in dtypes:
                native = native_declines(op, torch.device(device), (dtype,))
                reasons = {"native": native, "torch": None, "reference": None}
                rows.append((op, device, str(dtype).removeprefix("torch."), reasons))
    return rows
