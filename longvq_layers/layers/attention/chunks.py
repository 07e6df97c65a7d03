"""Chunks: parts of fixed length of a sequence. A token attends only to tokens of its own chunk."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """Where the tokens of (B, L, ...) lie in R chunks of C slots.

    Attributes:
        source: (R, C) int64, the number of the token in each slot, counted over all rows; arbitrary for an empty slot.
        valid: (R, C) bool, whether the slot holds an unmasked token.
        slot: (B, L) int64, the number of each token's slot, counted over all chunks; arbitrary if padding has none.
    """

    source: Tensor
    valid: Tensor
    slot: Tensor

    def split(self, x: Tensor) -> Tensor:
        """(B, L, d) -> (R, C, d)."""
        return x.flatten(0, 1)[self.source]

    def join(self, x: Tensor) -> Tensor:
        """(R, C, d) -> (B, L, d)."""
        return x.flatten(0, 1)[self.slot]


def chunks_of_rows(mask: Tensor, size: int) -> Chunks:
    """Chunks of rows with padding, mask (B, L) bool, L ≥ 1.

    The first chunk starts with a row's first unmasked token, so padding on the left moves no boundary. Masked tokens
    after it take a slot.
    """
    batch, length = mask.shape
    token = torch.arange(length, device=mask.device)
    start = mask.int().argmin(1, keepdim=True)  # (B, 1), 0 where all is masked
    row = torch.arange(batch, device=mask.device).unsqueeze(-1)
    slots = -(-length // size) * size  # of a row
    position = start + torch.arange(slots, device=mask.device)  # (B, slots)
    inside = position.clamp(max=length - 1)
    valid = (position < length) & ~mask.gather(1, inside)
    slot = (token - start).clamp(min=0) + row * slots
    return Chunks((inside + row * length).view(-1, size), valid.view(-1, size), slot)


def chunks_of_documents(offsets: Tensor, length: int, mask: Tensor | None, size: int) -> Chunks:
    """Chunks of documents packed into one row, offsets (N + 1,), L ≥ 1. A chunk holds tokens of one document.

    As in `chunks_of_rows`, the first chunk starts with the first unmasked token. The number of chunks is bounded by a
    function of the shapes, so nothing is read back from the device.
    """
    offsets = offsets.long()
    count = offsets.diff().add(size - 1).div(size, rounding_mode="floor")  # (N,) chunks of each document
    token = torch.arange(length, device=offsets.device)
    document = torch.searchsorted(offsets[1:].contiguous(), token, right=True)  # (L,)
    start = offsets[:-1]
    if mask is not None:
        unmasked = torch.where(mask[0], length, token)
        start = torch.full_like(start, length).scatter_reduce(0, document, unmasked, "amin")
    position = token - start[document]  # below 0 before the first unmasked token, which has no slot
    slots = (length // size + count.shape[0]) * size
    slot = torch.where(position < 0, slots, (count.cumsum(0) - count)[document] * size + position)
    source = torch.full((slots + 1,), length, device=offsets.device).scatter(0, slot, token)[:-1]
    valid = source < length
    source = source.clamp(max=length - 1)
    if mask is not None:
        valid = valid & ~mask[0, source]
    return Chunks(source.view(-1, size), valid.view(-1, size), slot.clamp(max=slots - 1).unsqueeze(0))
