"""What the CUDA kernels don't take, known before a call so that ``backend="auto"`` can choose another.

The kernels check the same again and ask for as much shared memory as is said here (tests/cuda/test_limits.py).
"""

import torch
from torch import Tensor

_ASSIGN_DEPTH, _ATTENTION_DEPTH, _MODES, _LENGTH = 256, 128, 32, 2**30
_BLOCKS = 65_535  # of a grid along its second and third axis
# Positions that a block has at least where it has not all of a row: of documents also those of the codes' gradients.
_SEGMENT, _SEGMENT_OF_DOCUMENTS = 2_048, 1_024

# Bytes of shared memory that a block of threads asks for, forward or backward, the most of its kernels. By whether
# numbers are in three parts of bfloat16, and by columns of keys, columns of values, groups of 16 modes.
SHARED_BYTES: dict[str, dict[tuple, int]] = {
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
    """Why ``vq_assign`` of keys (B, H, L, D) is not for the CUDA kernels; None if it is."""
    batch, heads, _, depth = k.shape
    if depth > _ASSIGN_DEPTH:
        return f"the CUDA kernel takes keys of up to D = {_ASSIGN_DEPTH}, got {depth}"
    case = (k.dtype != torch.bfloat16, _padded(depth))
    return _too_many("rows B", batch) or _too_many("heads H", heads) or _too_much(k.device, "vq_assign", case)


def attention(q: Tensor, v: Tensor, far_q: Tensor | None, cu_seqlens: Tensor | None, activation: str) -> str | None:
    """The same of ``vq_attention``, whose arguments these are."""
    batch, heads, length, depth = q.shape
    depth, values = max(depth, 0 if far_q is None else far_q.shape[-1]), v.shape[-1]
    if depth > _ATTENTION_DEPTH:
        return f"the CUDA kernels take q and k of up to D = {_ATTENTION_DEPTH}, got {depth}"
    if activation == "laplace" and q.dtype == torch.float16:
        return (
            'the CUDA kernels take activation="laplace" in float32 and bfloat16; its weights may leave float16\'s range'
        )
    if length > _LENGTH:
        return f"the CUDA kernels take up to {_LENGTH:,} positions, got {length:,}"
    case = (q.dtype == torch.float32, _padded(depth), 64 if values <= 64 else 128)
    pieces = batch * (length // _SEGMENT + 1)
    if cu_seqlens is not None:
        pieces = length // _SEGMENT_OF_DOCUMENTS + cu_seqlens.shape[0] - 1
    return (
        _too_many("rows or documents with their segments", pieces)
        or _too_many("columns of values of all heads, H E", heads * values)
        or _too_much(q.device, "vq_attention", case)
    )


def scan(u: Tensor, modes: int, cu_seqlens: Tensor | None) -> str | None:
    """The same of ``ssm_scan`` with so many modes."""
    batch, length, _ = u.shape
    if modes > _MODES:
        return f"the CUDA kernels take up to N = {_MODES} modes, got {modes}"
    case = (u.dtype != torch.bfloat16, 1 if modes <= 16 else 2)
    pieces = max(batch, length // _SEGMENT + (1 if cu_seqlens is None else cu_seqlens.shape[0] - 1))
    return _too_many("rows, or documents with their segments", pieces) or _too_much(u.device, "ssm_scan", case)


def _padded(depth: int) -> int:
    return 64 if depth <= 64 else 128 if depth <= 128 else 256


def _too_many(what: str, count: int) -> str | None:
    return f"the CUDA kernels take up to {_BLOCKS:,} {what}, got {count:,}" if count > _BLOCKS else None


def _too_much(device: torch.device, op: str, case: tuple) -> str | None:
    """Where a GPU has less shared memory than the kernels for these sizes ask for."""
    needed, there = SHARED_BYTES[op][case], torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if needed <= there:
        return None
    return f"the CUDA kernels need {needed:,} bytes of shared memory for these sizes, this GPU has {there:,}"
