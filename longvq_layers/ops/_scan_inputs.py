"""The arguments of ``ssm_scan``, as one object."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from longvq_layers.ops._packed import documents, part


class ScanInputs(NamedTuple):
    """The arguments of one call of ``ssm_scan``, in the order of the schema."""

    u: Tensor  # (B, L, H)
    log_decay: Tensor  # (H, N)
    weight: Tensor  # (H, N)
    skip: Tensor | None  # (H,)
    initial_state: Tensor | None  # (B, H, N), or (documents, H, N)
    key_padding_mask: Tensor | None  # (B, L)
    cu_seqlens: Tensor | None
    reverse: bool

    def documents(self) -> Iterator[tuple[int, slice, "ScanInputs"]]:
        """For each packed document its number, its positions, and its tensors as the inputs of a separate call."""
        assert self.cu_seqlens is not None
        for n, at in enumerate(documents("ssm_scan", self.cu_seqlens, self.u.shape[1])):
            yield (
                n,
                at,
                self._replace(
                    u=self.u[:, at],
                    initial_state=part(self.initial_state, slice(n, n + 1), 0),
                    key_padding_mask=part(self.key_padding_mask, at, 1),
                    cu_seqlens=None,
                ),
            )


class ScanGradients(NamedTuple):
    """The gradients of the inputs of the same name; an empty tensor for a gradient that is not computed."""

    u: Tensor
    log_decay: Tensor
    weight: Tensor
    skip: Tensor
    initial_state: Tensor
