"""Documents packed into one row: their places, for the backends that take them one by one."""

import itertools

from torch import Tensor

from longvq_layers import _checks as check


def documents(op: str, cu_seqlens: Tensor, length: int) -> list[slice]:
    """The positions of each document, from offsets (N+1,), which are looked at again: compiled callers could not."""
    offsets = cu_seqlens.tolist()
    check.offsets(op, offsets, length)
    return [slice(start, end) for start, end in itertools.pairwise(offsets)]


def part(x: Tensor | None, positions: slice, dim: int) -> Tensor | None:
    """One document's part of an optional tensor."""
    return None if x is None else x.narrow(dim, positions.start, positions.stop - positions.start)
