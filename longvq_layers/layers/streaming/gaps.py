"""Causal models count tokens, not positions: padding between tokens of a row is as if it weren't there.

So it is in generation, where padding never enters the state. A batch of conversations has such gaps: each turn is
padded to the longest. Without this they would push keys out of the window in the forward alone.
"""

import torch
from torch import Tensor


def order_without_gaps(key_padding_mask: Tensor) -> Tensor | None:
    """Order (B, L) in which the tokens of each row come first, as they follow each other, and then its padding.

    Args:
        key_padding_mask: (B, L) bool, True = ignore.

    Returns:
        None where the tokens of every row lie together already.
    """
    if not torch.compiler.is_compiling():  # a compiled graph can't branch on it
        starts = (~key_padding_mask[:, 1:] & key_padding_mask[:, :-1]).sum(1)  # of runs of tokens, but for one at 0
        if not bool((starts + ~key_padding_mask[:, :1].any(1) > 1).any()):
            return None
    return key_padding_mask.to(torch.uint8).sort(dim=1, stable=True).indices


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """x (B, …, L, C) with row b's position i taken from ``order[b, i]``."""
    return x.gather(-2, order.view(len(order), *[1] * (x.dim() - 3), -1, 1).expand_as(x))


def put_back(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `reorder`."""
    return reorder(x, order.argsort(dim=1))
