"""Padding of sequences."""

from torch import Tensor


def zero_padding(y: Tensor, mask: Tensor | None) -> Tensor:
    """y (B, L, ...) with exact zeros where mask (B, L) is True."""
    return y if mask is None else y.masked_fill(mask.unsqueeze(-1), 0)
