"""The base class of layers of sequences."""

from torch import Tensor, nn

from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.padding import zero_padding


class SequenceLayer(nn.Module):
    """A layer from (B, L, width) to (B, L, width) that takes padding masks and, most of them, packed documents."""

    def _width_and_parameter(self) -> tuple[int, Tensor]:
        """The width of the input, and a parameter with the dtype and device that the input must have."""
        raise NotImplementedError

    def _checked_input(
        self, name: str, x: Tensor, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Check the arguments of `forward` or `step`, and return x with zeros at masked positions.

        Padding may hold anything, even NaN, which would reach the gradients of the projections as 0 · NaN.
        """
        input_checks.sequence(name, "x", x, *self._width_and_parameter(), key_padding_mask)
        input_checks.packed(name, "x", x, cu_seqlens)
        return zero_padding(x, key_padding_mask)
