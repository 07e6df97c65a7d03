"""The tensors of the attention operators, as one object."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longvq_layers.ops._packed import documents, part


class AttentionInputs(NamedTuple):
    """The tensors of one call of ``vq_attention``, in the order of the schema."""

    q: Tensor  # (B, H, L, D)
    k: Tensor  # (B, Hkv, L, D)
    v: Tensor  # (B, Hkv, L, E)
    codebook: Tensor  # (Hkv, S, F), F = D without far_q
    codes: Tensor  # (B, Hkv, L)
    bias: Tensor | None
    key_padding_mask: Tensor | None  # (B, L)
    cu_seqlens: Tensor | None
    far_q: Tensor | None = None  # (B, H, L, F)
    far_k: Tensor | None = None  # (B, Hkv, L, F)

    @property
    def precise(self) -> torch.dtype:
        """The dtype to compute in: that of ``q``, at least float32."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def documents(self) -> Iterator[tuple[slice, "AttentionInputs"]]:
        """For each packed document its positions, and its tensors as the inputs of a separate call."""
        assert self.cu_seqlens is not None
        for at in documents("vq_attention", self.cu_seqlens, self.q.shape[2]):
            yield (
                at,
                AttentionInputs(
                    self.q[:, :, at],
                    self.k[:, :, at],
                    self.v[:, :, at],
                    self.codebook,
                    self.codes[:, :, at],
                    self.bias,
                    part(self.key_padding_mask, at, 1),
                    None,
                    part(self.far_q, at, 2),
                    part(self.far_k, at, 2),
                ),
            )


class AttentionGradients(NamedTuple):
    """The gradients of the inputs of the same name, in their dtype; an empty tensor for an input that is None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    far_q: Tensor
    far_k: Tensor


class AttentionStepInputs(NamedTuple):
    """The tensors of one call of ``vq_attention_step`` but for its state, in the order of the schema."""

    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, Hkv, T, D)
    v: Tensor  # (B, Hkv, T, E)
    codebook: Tensor  # (Hkv, S, F), F = D without far_q
    codes: Tensor | None  # (B, Hkv, T)
    bias: Tensor | None  # (H, W)
    key_padding_mask: Tensor | None  # (B, T)
    far_q: Tensor | None = None  # (B, H, T, F)
    far_k: Tensor | None = None  # (B, Hkv, T, F)
