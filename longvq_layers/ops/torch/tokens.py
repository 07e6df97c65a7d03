"""Moves the tokens of each row: an order without the padding between them, and tokens by their positions."""

import torch
from torch import Tensor


def tokens_first(key_padding_mask: Tensor) -> Tensor:
    """The order (B, L), int64, of a mask (B, L): the tokens of each row, then its padding, both as they were."""
    return key_padding_mask.to(torch.uint8).argsort(dim=1, stable=True)


def take(x: Tensor, index: Tensor, axis: int = 2) -> Tensor:
    """The tokens of x (B, …, L, …) at the positions of index (B, M), on the axis that has the length."""
    view, result = [len(index)] + [1] * (x.dim() - 1), list(x.shape)
    view[axis] = result[axis] = index.shape[1]
    return x.gather(axis, index.view(view).expand(result))
