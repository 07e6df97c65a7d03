"""Checks of what a layer is called with, in the wording of the operators' checks."""

import torch
from torch import Tensor

from longvq_layers import _checks as check


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
