"""Padding of sequences."""

from torch import Tensor


def zero_padding(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """x (B, L, ...) with exact zeros where the mask (B, L) is True."""
    return x if key_padding_mask is None else x.masked_fill(key_padding_mask.unsqueeze(-1), 0)
