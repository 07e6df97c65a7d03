"""Checks of a layer's inputs, in the grammar of `longvq_layers._checks`."""

import torch
from torch import Tensor

from longvq_layers import _checks as check


def sequence(layer: str, name: str, x: Tensor, width: int, parameter: Tensor, key_padding_mask: Tensor | None) -> None:
    """`x` is (B, L, width) with the dtype and device of the layer's `parameter`; the mask is (B, L) bool or None.

    Under autocast `x` may have any floating dtype.
    """
    check.tensor(layer, name, x, "B L d_model")
    check.real(layer, name, x)
    check.size(layer, name, x, (x.shape[0], x.shape[1], width), "B L d_model")
    check.same_device(layer, "the layer's parameters", parameter, **{name: x})
    layer_dtype(layer, name, x, parameter)
    padding(layer, key_padding_mask, x)


def layer_dtype(layer: str, name: str, x: Tensor, parameter: Tensor) -> None:
    """`x` has the dtype of the layer's `parameter`, or autocast is on."""
    if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{layer}: {name} must have the dtype of the layer, {parameter.dtype}, got {x.dtype}; convert one of them "
            f"(`{name}.to(dtype)` or `layer.to(dtype)`) or run under torch.autocast"
        )


def padding(layer: str, key_padding_mask: Tensor | None, x: Tensor) -> None:
    """The mask is None or (B, L) bool on the device of x (B, L, ...)."""
    if key_padding_mask is not None:
        check.key_padding_mask(layer, key_padding_mask, x.shape[0], x.shape[1])
        check.same_device(layer, "the input", x, key_padding_mask=key_padding_mask)


def packed(layer: str, name: str, x: Tensor, cu_seqlens: Tensor | None, axis: int = 1) -> None:
    """`cu_seqlens` is None or splits the only row of x into documents; `axis` is the axis of x that has the length."""
    if cu_seqlens is not None:
        check.cu_seqlens(layer, name, x, cu_seqlens, axis)
