"""Attention in chunks over growing sequences, for `MegaBlock.step`."""

import torch
from torch import Tensor

from longvq_layers.layers.attention.gated import GatedAttention
from longvq_layers.layers.streaming.states import MegaState


def step_in_chunks(
    attention: GatedAttention, q: Tensor, k: Tensor, v: Tensor, state: MegaState, key_padding_mask: Tensor | None
) -> Tensor:
    """Attend from the next tokens within their chunks, and update `state` in place.

    Args:
        attention: causal, with a chunk length C.
        q, k: (B, T, dim), T ≥ 1.
        v: (B, T, E).
        key_padding_mask: (B, T) bool, True = the token takes no position. Default none.

    Returns:
        (B, T, E); any finite numbers at masked tokens.
    """
    if q.shape[1] == 1:
        return _one_token(attention, q, k, v, state, key_padding_mask)
    size = state.keys.shape[1]
    keep = torch.ones_like(q[..., 0], dtype=torch.bool) if key_padding_mask is None else ~key_padding_mask
    filled = state.lengths % size  # (B,) tokens that the current chunk has
    total = filled + keep.sum(1)  # (B,)
    slots = -(-(size - 1 + q.shape[1]) // size) * size  # enough for a chunk that is almost full and T tokens
    # All masked tokens go to one more slot at the end, which is dropped.
    slot = torch.where(keep, filled.unsqueeze(-1) + keep.cumsum(1) - 1, slots).unsqueeze(-1)  # (B, T, 1)
    keys, values = _in_slots(state.keys, k, slot, slots), _in_slots(state.values, v, slot, slots)
    queries = _in_slots(torch.zeros_like(state.keys), q, slot, slots)
    valid = torch.arange(slots, device=q.device) < total.unsqueeze(-1)
    chunks = [x.reshape(-1, size, x.shape[-1]) for x in (queries, keys, values)]
    out = attention.attend(chunks[0], chunks[1], chunks[2], valid.view(-1, size)).view(q.shape[0], slots, -1)
    last = (total // size * size).unsqueeze(-1) + torch.arange(size, device=q.device)  # slots of the last chunk
    last = last.clamp(max=slots - 1).unsqueeze(-1)  # an empty last chunk may lie beyond the end
    state.keys.copy_(keys.gather(1, last.expand_as(state.keys)))
    state.values.copy_(values.gather(1, last.expand_as(state.values)))
    state.lengths += keep.sum(1)
    return out.gather(1, slot.clamp(max=slots - 1).expand(-1, -1, out.shape[-1]))


def _in_slots(past: Tensor, new: Tensor, slot: Tensor, slots: int) -> Tensor:
    """(B, slots, d) with `past` (B, C, d) in the first C slots, then `new` (B, T, d) in the slots (B, T, 1)."""
    room = torch.nn.functional.pad(past, (0, 0, 0, slots + 1 - past.shape[1])).to(new.dtype)
    return room.scatter(1, slot.expand_as(new), new)[:, :slots]


def _one_token(
    attention: GatedAttention, q: Tensor, k: Tensor, v: Tensor, state: MegaState, key_padding_mask: Tensor | None
) -> Tensor:
    position = state.lengths % state.keys.shape[1]
    for past, new in ((state.keys, k), (state.values, v)):
        at = position.view(-1, 1, 1).expand(-1, 1, past.shape[-1])
        new = new.to(past.dtype)
        if key_padding_mask is not None:
            new = torch.where(key_padding_mask.unsqueeze(-1), past.gather(1, at), new)
        past.scatter_(1, at, new)
    state.lengths += 1 if key_padding_mask is None else (~key_padding_mask).sum(1)
    return attention.attend_one(q, state.keys.to(q.dtype), state.values.to(q.dtype), position)
