"""The state of a swapped attention between two calls of `step`."""

from dataclasses import dataclass

from torch import Tensor

from longvq_layers import ops


@dataclass(eq=False)
class SwappedState:
    """The past of a batch of sequences.

    Attributes:
        past: counts and sums of values per code, and the keys and values in the window; updated in place.
        codebook: codewords with the extra dimensions of the scores; constant.
    """

    past: ops.VQAttentionState
    codebook: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the past, in bytes; the same at every length."""
        return self.past.nbytes

    def index_select(self, rows: Tensor) -> "SwappedState":
        """A new state whose row i is a copy of row ``rows[i]``."""
        return SwappedState(self.past.index_select(rows), self.codebook)
