"""Checks of arguments, for every public function and layer.

Every message has one grammar: ``operation: argument must be …, got …``. A wrong type raises TypeError, a wrong value
ValueError.
"""

import itertools
import math
import os
from collections.abc import Sequence
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

_NUMBERS = (int, float, Real)  # Real covers NumPy's scalars; the builtin types come first because its check is slow


# ---- plain values ---------------------------------------------------------------------------------------------------


def integer(op: str, name: str, value: object, least: int | None = None) -> None:
    """``value`` is an int, and at least ``least`` where a least value is given."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def positive(op: str, **values: object) -> None:
    """Each value is an int of at least 1."""
    for name, value in values.items():
        integer(op, name, value, 1)


def number(op: str, name: str, value: object) -> None:
    """``value`` is a real number; a bool is not one."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")


def probability(op: str, name: str, value: float) -> None:
    """``value`` is a number in [0, 1)."""
    number(op, name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{op}: {name} must be at least 0 and below 1, got {value}")


def flags(op: str, **values: object) -> None:
    """Each value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {value!r}")


def function(op: str, name: str, value: object, optional: bool = True) -> None:
    """``value`` is callable, or None where it is optional."""
    if not callable(value) and not (optional and value is None):
        wanted = "a callable or None" if optional else "a callable"
        raise TypeError(f"{op}: {name} must be {wanted}, got {type(value).__name__}")


def path(op: str, name: str, value: object) -> None:
    """``value`` is a path: a string or an `os.PathLike`."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{op}: {name} must be a path, got {type(value).__name__}")


def module(op: str, name: str, value: object) -> None:
    """``value`` is a `torch.nn.Module`."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{op}: {name} must be a torch.nn.Module, got {type(value).__name__}")


def one_of(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """``value`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def divides(op: str, name: str, value: int, of: str, total: int) -> None:
    """``total``, called ``of``, is a multiple of ``value``."""
    if total % value:
        raise ValueError(f"{op}: {of} must be a multiple of {name}, got {total} and {value}")


def floating(op: str, dtype: object) -> None:
    """``dtype`` is None or a floating dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{op}: dtype must be a floating torch dtype, got {dtype!r}")


class _OnDevice(Protocol):
    """A tensor, or a state of tensors."""

    @property
    def device(self) -> torch.device: ...


# ---- tensors --------------------------------------------------------------------------------------------------------


def tensor(op: str, name: str, x: object, dims: str) -> None:
    """``x`` is a tensor with as many axes as ``dims`` ("B H L D") has letters."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor ({dims.replace(' ', ', ')}), got {type(x).__name__}")
    rank = len(dims.split())
    if x.dim() != rank:
        raise ValueError(
            f"{op}: {name} must have {rank} dimensions ({dims.replace(' ', ', ')}), got {x.dim()}: {tuple(x.shape)}"
        )


def real(op: str, name: str, x: Tensor) -> None:
    """``x`` is a real floating-point tensor."""
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be a real floating-point tensor, got {x.dtype}")


def same_device(op: str, first: str, expected: Tensor, **others: _OnDevice | None) -> None:
    """All other tensors and states are on the device of ``expected``, an argument named ``first``; None is skipped."""
    for name, x in others.items():
        if x is not None and x.device != expected.device:
            raise ValueError(f"{op}: {name} must be on the device of {first}, {expected.device}, got {x.device}")


def same_dtype(op: str, first: str, expected: torch.dtype, **others: Tensor | None) -> None:
    """All others have the expected dtype, that of an argument named ``first``; None is skipped."""
    for name, x in others.items():
        if x is not None and x.dtype != expected:
            raise TypeError(f"{op}: {name} must have the dtype of {first}, {expected}, got {x.dtype}")


def size(op: str, name: str, x: Tensor, expected: tuple[int, ...], dims: str) -> None:
    """``x`` has the expected shape; ``dims`` ("B H L D") names its axes."""
    if tuple(x.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape ({dims.replace(' ', ', ')}) = {expected}, got {tuple(x.shape)}")


def at_least_one(op: str, name: str, x: Tensor, axis: int, meaning: str) -> None:
    """``axis`` of ``x`` has at least one entry; ``meaning`` names such an entry."""
    if x.shape[axis] < 1:
        raise ValueError(f"{op}: {name} must have at least one {meaning}, got shape {tuple(x.shape)}")


def key_padding_mask(op: str, mask: Tensor, batch: int, length: int) -> None:
    """``mask`` is a bool tensor (B, L)."""
    tensor(op, "key_padding_mask", mask, "B L")
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: key_padding_mask must be bool with True = ignore, got {mask.dtype}")
    size(op, "key_padding_mask", mask, (batch, length), "B L")


def cu_seqlens(op: str, first: str, x: Tensor, value: Tensor, axis: int = 1) -> None:
    """``value`` (N+1,) splits ``x``, an argument named ``first`` with a batch of 1, along ``axis``."""
    tensor(op, "cu_seqlens", value, "N+1")
    if value.dtype != torch.int32:
        hint = "; use cu_seqlens.int()" if value.dtype == torch.int64 else ""
        raise TypeError(f"{op}: cu_seqlens must be int32, got {value.dtype}{hint}")
    same_device(op, first, x, cu_seqlens=value)
    if x.shape[0] != 1:
        raise ValueError(
            f"{op}: {first} must have a batch of 1 with cu_seqlens, which packs all documents into one row, "
            f"got {x.shape[0]}"
        )
    at_least_one(op, "cu_seqlens", value, 0, "offset")
    if values_are_readable(value):
        offsets(op, value.tolist(), x.shape[axis])


def offsets(op: str, values: list[int], length: int) -> None:
    """The values of ``cu_seqlens`` start with 0, never decrease and end with ``length``."""
    if values[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start with 0, got {values[0]}")
    if values[-1] != length:
        raise ValueError(f"{op}: cu_seqlens must end with the length L = {length}, got {values[-1]}")
    for n, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            raise ValueError(f"{op}: cu_seqlens must not decrease, got {start} and then {end} at index {n + 1}")


def window(op: str, value: object) -> None:
    """``value`` is a number of positions, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: window must be an int, in positions, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{op}: window must be 0 (none) or more positions, got {value}")


def values_are_readable(x: Tensor) -> bool:
    """Whether values can be read cheaply: ``x`` is on the CPU, and neither a tracer nor `torch.func` is active."""
    if x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    try:
        x.data_ptr()  # raises for the wrappers of `torch.func`, which are Tensors without storage
    except RuntimeError:
        return False
    return True


def codebook_values(op: str, codebook: Tensor) -> None:
    """``codebook`` (H, S, D) is not empty and is finite; only values on the CPU are checked."""
    at_least_one(op, "codebook", codebook, 1, "code S")
    at_least_one(op, "codebook", codebook, 2, "dimension D")
    if values_are_readable(codebook) and not _all_finite(codebook.detach()):
        bad = int((~torch.isfinite(codebook)).any(-1).sum())
        raise ValueError(f"{op}: codebook must be finite, got NaN or infinity in {bad} of its codewords")


def _all_finite(x: Tensor) -> bool:
    # A finite sum has finite terms, and is much cheaper than a test of every entry; large entries can overflow the sum.
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())
