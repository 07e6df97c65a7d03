"""Refuse derivatives that the operators don't have and that PyTorch would take for zero."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError if one of the tensors carries a forward-mode tangent.

    An operator defined through ``torch.library`` drops tangents silently when no argument requires a gradient.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f'{op}: forward-mode derivatives are not supported; use backend="reference"')
