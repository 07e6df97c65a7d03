"""Documents packed into one row, for the backends that process them one after the other."""

import itertools

from torch import Tensor

from longvq_layers import _checks as check


def documents(op: str, cu_seqlens: Tensor, length: int) -> list[slice]:
    """The positions of each document, from the offsets ``cu_seqlens`` (N+1,).

    The values are checked here again, because a compiled caller could not read them.
    """
    offsets = cu_seqlens.tolist()
    check.offsets(op, offsets, length)
    return [slice(start, end) for start, end in itertools.pairwise(offsets)]


def part(x: Tensor | None, positions: slice, dim: int) -> Tensor | None:
    """A view of ``x`` at these positions along ``dim``; None if ``x`` is None."""
    return None if x is None else x.narrow(dim, positions.start, positions.stop - positions.start)
