"""Modules whose parameters and buffers must not be stored in half precision."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from longvq_layers.layers.common.factory import Factory


class KeepsFloat32(nn.Module):
    """A module whose own floating parameters and buffers stay float32 (or float64) under `.half()` and `.bfloat16()`.

    A codebook in bfloat16 loses codes. An SSM whose step size or decay has 8 significant bits forgets or explodes.
    Submodules are converted as usual, and so is everything else that `_apply` does (device, `to_empty`,
    `share_memory_`).
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def at_least_float32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.is_floating_point() and result.dtype.itemsize < 4:
                return tensor.to(device=result.device, dtype=torch.float32)
            return result

        return super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]  # of PyTorch


def storage_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a `KeepsFloat32` module's parameters in a layer made with `dtype`: float64 or float32."""
    dtype = dtype or torch.get_default_dtype()
    return torch.float64 if dtype == torch.float64 else torch.float32


def storage_factory(device: torch.device | str | None, dtype: torch.dtype | None) -> Factory:
    """Where a `KeepsFloat32` module makes its parameters in a layer made with `device` and `dtype`."""
    return {"device": device, "dtype": storage_dtype(dtype)}
