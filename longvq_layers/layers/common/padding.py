"""Padding of sequences, and the masks of dense attention."""

import torch
from torch import Tensor


def zero_padding(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """x (B, L, ...) with exact zeros where the mask (B, L) is True."""
    return x if key_padding_mask is None else x.masked_fill(key_padding_mask.unsqueeze(-1), 0)


def allowed_pairs(key_padding_mask: Tensor, causal: bool) -> Tensor:
    """(B, 1, L or 1, L) bool, True = attend. The mask is (B, L) bool, True = ignore this key."""
    allowed = ~key_padding_mask[:, None, None, :]
    return allowed & causal_pairs(key_padding_mask.shape[1], key_padding_mask.device) if causal else allowed


def causal_pairs(length: int, device: torch.device) -> Tensor:
    """(L, L) bool, True = attend: to the present and the past."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
