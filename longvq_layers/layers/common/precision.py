"""Modules whose numbers must never be stored in half precision."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """A module whose own floating parameters and buffers stay float32 (or float64) under `.half()`, `.bfloat16()`.

    A codebook in bfloat16 loses codes, and an SSM whose step or decay is rounded to 8 bits forgets or explodes.
    Everything else that `_apply` does (device, `to_empty`, `share_memory_`) is as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def at_least_float32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.is_floating_point() and result.dtype.itemsize < 4:
                return tensor.to(device=result.device, dtype=torch.float32)
            return result

        return super()._apply(at_least_float32, recurse)


def storage_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which such a module stores its numbers when a layer is made with `dtype=`."""
    dtype = dtype or torch.get_default_dtype()
    return torch.float64 if dtype == torch.float64 else torch.float32
