"""Limits of the CUDA kernels, checked before a call: the native backend declines arguments beyond them.

The kernels check the same limits and ask for the same shared memory; tests/cuda/test_limits.py compares them.
"""

import torch
from torch import Tensor

_MAX_ASSIGN_HEAD_DIM, _MAX_ATTENTION_HEAD_DIM, _MAX_MODES, _MAX_LENGTH = 256, 128, 32, 2**30
_MAX_GRID = 65_535  # blocks along the second and third axis of a grid
# A kernel cuts long sequences into segments of at least so many positions. The minimum is smaller for packed documents,
# because the gradients of codes use shorter segments.
_MIN_SEGMENT, _MIN_SEGMENT_OF_DOCUMENTS = 2_048, 1_024

# Bytes of shared memory of a block of threads: the most that any kernel of the operator asks for, forward or backward.
# A key has first whether a number is stored as three bfloat16 terms. Then it has the padded D (and the padded E) or,
# for the scan, the number of groups of 16 modes.
SHARED_BYTES: dict[str, dict[tuple[int, ...], int]] = {
    "vq_assign": {
        (False, 64): 46_080,
        (False, 128): 87_040,
        (False, 256): 84_480,
        (True, 64): 55_296,
        (True, 128): 104_448,
        (True, 256): 152_064,
    },
    "vq_attention": {
        (False, 64, 64): 68_096,
        (False, 64, 128): 68_096,
        (False, 128, 64): 68_096,
        (False, 128, 128): 78_080,
        (True, 64, 64): 73_472,
        (True, 64, 128): 113_664,
        (True, 128, 64): 104_192,
        (True, 128, 128): 138_240,
    },
    "ssm_scan": {(False, 1): 77_824, (False, 2): 124_928, (True, 1): 95_488, (True, 2): 159_744},
}


def assign(k: Tensor) -> str | None:
    """Why the CUDA kernels don't take ``vq_assign`` of keys (B, H, L, D); None if they do."""
    batch, heads, _, head_dim = k.shape
    return (
        _above("D", head_dim, _MAX_ASSIGN_HEAD_DIM)
        or _above("B", batch, _MAX_GRID)
        or _above("H", heads, _MAX_GRID)
        or _lacks_shared_memory(k.device, "vq_assign", (k.dtype != torch.bfloat16, _padded_head_dim(head_dim)))
    )


def attention(q: Tensor, v: Tensor, far_q: Tensor | None, cu_seqlens: Tensor | None, activation: str) -> str | None:
    """Why the CUDA kernels don't take ``vq_attention`` with these arguments; None if they do."""
    batch, heads, length, head_dim = q.shape
    head_dim, value_dim = max(head_dim, 0 if far_q is None else far_q.shape[-1]), v.shape[-1]
    if activation == "laplace" and q.dtype == torch.float16:
        return (
            'with activation="laplace" q must be float32 or bfloat16 for the CUDA kernels, got float16, '
            "whose range its weights may leave"
        )
    num_segments = batch * (length // _MIN_SEGMENT + 1)
    if cu_seqlens is not None:
        num_segments = length // _MIN_SEGMENT_OF_DOCUMENTS + cu_seqlens.shape[0] - 1
    return (
        _above("D", head_dim, _MAX_ATTENTION_HEAD_DIM)
        or _above("L", length, _MAX_LENGTH)
        or _above("the number of segments of rows or documents", num_segments, _MAX_GRID)
        or _above("H * E", heads * value_dim, _MAX_GRID)
        or _lacks_shared_memory(
            q.device,
            "vq_attention",
            (q.dtype == torch.float32, _padded_head_dim(head_dim), 64 if value_dim <= 64 else 128),
        )
    )


def scan(u: Tensor, modes: int, cu_seqlens: Tensor | None) -> str | None:
    """Why the CUDA kernels don't take ``ssm_scan`` of u (B, L, H) with this number of modes; None if they do."""
    batch, length, _ = u.shape
    num_segments = max(batch, length // _MIN_SEGMENT + (1 if cu_seqlens is None else cu_seqlens.shape[0] - 1))
    return (
        _above("N", modes, _MAX_MODES)
        or _above("the number of segments of rows or documents", num_segments, _MAX_GRID)
        or _lacks_shared_memory(u.device, "ssm_scan", (u.dtype != torch.bfloat16, 1 if modes <= 16 else 2))
    )


def _padded_head_dim(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def _above(name: str, value: int, most: int) -> str | None:
    return f"{name} must be at most {most:,} for the CUDA kernels, got {value:,}" if value > most else None


def _lacks_shared_memory(device: torch.device, op: str, case: tuple[int, ...]) -> str | None:
    needed = SHARED_BYTES[op][case]
    properties = torch.cuda.get_device_properties(device)
    available: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in torch's stubs
    if needed <= available:
        return None
    return f"the CUDA kernels need {needed:,} bytes of shared memory for these sizes, this GPU has {available:,}"
