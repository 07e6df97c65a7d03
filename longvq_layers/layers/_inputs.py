"""Checks of what a layer is called with, in the wording of the operators' checks."""

from numbers import Real

import torch
from torch import Tensor

from longvq_layers.ops import _checks as check

_NUMBERS = (int, float, Real)  # Real: NumPy's scalars; the builtin types first, for its own check takes longer


def sequence(layer: str, name: str, x: object, width: int, parameter: Tensor, mask: Tensor | None) -> None:
    """`x` is (B, L, width) in the dtype and on the device of the layer's `parameter`; `mask` is (B, L) bool.

    Under autocast any real dtype will do.
    """
    check.tensor(layer, name, x, "B L d_model")
    check.real(layer, name, x)
    check.size(layer, name, x, (x.shape[0], x.shape[1], width), "B L d_model")
    check.same_device(layer, f"the layer's parameters and {name}", parameter, **{name: x})
    layer_dtype(layer, name, x, parameter)
    padding(layer, mask, x)


def layer_dtype(layer: str, name: str, x: Tensor, parameter: Tensor) -> None:
    """`x` has the dtype of the layer's `parameter`, or autocast is on."""
    if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{layer}: {name} must have the dtype of the layer, {parameter.dtype}, got {x.dtype}; convert one of them "
            f"(`{name}.to(dtype)` or `layer.to(dtype)`) or run under torch.autocast"
        )


def padding(layer: str, mask: object, x: Tensor) -> None:
    """`mask` is None or (B, L) bool on the device of x (B, L, ...)."""
    if mask is not None:
        check.key_padding_mask(layer, mask, x.shape[0], x.shape[1])
        check.same_device(layer, "the input", x, key_padding_mask=mask)


def packed(layer: str, name: str, x: Tensor, cu_seqlens: object, axis: int = 1) -> None:
    """`cu_seqlens` is None or the offsets of documents packed into the one row of x, whose length is that of `axis`."""
    if cu_seqlens is not None:
        check.cu_seqlens(layer, name, x, cu_seqlens, axis)


def positive(layer: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{layer}: {name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{layer}: {name} must be at least 1, got {value}")


def flags(layer: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{layer}: {name} must be a bool, got {value!r}")


def floating(layer: str, dtype: object) -> None:
    """`dtype` is None or a floating dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{layer}: dtype must be a floating torch dtype, got {dtype!r}")


def number(layer: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{layer}: {name} must be a number, got {value!r}")


def probability(layer: str, name: str, value: float) -> None:
    number(layer, name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{layer}: {name} must be at least 0 and below 1, got {value}")


def divides(layer: str, name: str, value: int, of: str, total: int) -> None:
    if total % value:
        raise ValueError(f"{layer}: {of} must be a multiple of {name}, got {total} and {value}")


def zero_padding(y: Tensor, mask: Tensor | None) -> Tensor:
    """y (B, L, ...) with exact zeros where mask (B, L) is True."""
    return y if mask is None else y.masked_fill(mask.unsqueeze(-1), 0)


def call_repr(positional: tuple, **keywords: object) -> str:
    """The arguments of a call as Python would read them back."""
    return ", ".join([repr(value) for value in positional] + [f"{name}={value!r}" for name, value in keywords.items()])
