"""Gaps: padding between the tokens of a row. A batch of conversations has gaps if each turn is padded to the longest.

Causal models count tokens instead of positions, so that gaps change nothing. `forward` must agree with generation, in
which padding never enters the state. If `forward` counted positions, gaps would push keys out of its window.
"""

import torch
from torch import Tensor

from longvq_layers.ops.torch.tokens import take, tokens_first


def order_without_gaps(key_padding_mask: Tensor) -> Tensor | None:
    """The order (B, L) that moves the tokens of each row to the front, and its padding to the end.

    Args:
        key_padding_mask: (B, L) bool, True = ignore.

    Returns:
        int64 indices of positions; tokens keep their order. None if no row has a gap; never None in a compiled graph.
    """
    if not torch.compiler.is_compiling():  # a compiled graph can't branch on it
        # The number of runs of tokens per row. A run starts after padding, or at position 0.
        starts = (~key_padding_mask[:, 1:] & key_padding_mask[:, :-1]).sum(1)
        if not bool((starts + ~key_padding_mask[:, :1].any(1) > 1).any()):
            return None
    return tokens_first(key_padding_mask)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """x (B, …, L, C) with position i of row b taken from ``order[b, i]``."""
    return take(x, order, axis=-2)


def put_back(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `reorder`."""
    return reorder(x, order.argsort(dim=1))
