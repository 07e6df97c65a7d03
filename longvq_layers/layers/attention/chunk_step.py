"""Attention in chunks, piece by piece. It updates the state."""

import torch
from torch import Tensor

from longvq_layers.layers.attention.gated import GatedAttention
from longvq_layers.layers.streaming.states import MegaState


def attention_step(
    attention: GatedAttention, q: Tensor, k: Tensor, v: Tensor, state: MegaState, mask: Tensor | None
) -> Tensor:
    """Attention of the next tokens, q and k (B, T, dim), v (B, T, E), T ≥ 1, within their chunks; (B, T, E).

    At masked tokens, (B, T), which take no position, the result is any finite number.
    """
    if q.shape[1] == 1:
        return _one_token(attention, q, k, v, state, mask)
    size = attention.chunk
    keep = torch.ones_like(q[..., 0], dtype=torch.bool) if mask is None else ~mask
    filled = state.lengths % size
    total = filled + keep.sum(1)  # (B,)
    width = -(-(size - 1 + q.shape[1]) // size) * size  # slots for what a chunk holds at most before, and T tokens
    # Masked tokens all go to one slot behind the others.
    slot = torch.where(keep, filled.unsqueeze(-1) + keep.cumsum(1) - 1, width).unsqueeze(-1)  # (B, T, 1)
    keys, values = _laid_out(state.keys, k, slot, width), _laid_out(state.values, v, slot, width)
    queries = _laid_out(torch.zeros_like(state.keys), q, slot, width)
    valid = torch.arange(width, device=q.device) < total.unsqueeze(-1)
    rows = [x.reshape(-1, size, x.shape[-1]) for x in (queries, keys, values)]
    out = attention.attend(*rows, valid.view(-1, size)).view(q.shape[0], width, -1)
    last = (total // size * size).unsqueeze(-1) + torch.arange(size, device=q.device)
    last = last.clamp(max=width - 1).unsqueeze(-1)  # beyond: a chunk that begins with the next token
    state.keys.copy_(keys.gather(1, last.expand_as(state.keys)))
    state.values.copy_(values.gather(1, last.expand_as(state.values)))
    state.lengths += keep.sum(1)
    return out.gather(1, slot.clamp(max=width - 1).expand(-1, -1, out.shape[-1]))


def _laid_out(past: Tensor, new: Tensor, slot: Tensor, width: int) -> Tensor:
    """(B, width, d) with `past` (B, C, d) in the first C slots and then `new` (B, T, d) in theirs."""
    room = torch.nn.functional.pad(past, (0, 0, 0, width + 1 - past.shape[1])).to(new.dtype)
    return room.scatter(1, slot.expand_as(new), new)[:, :width]


def _one_token(
    attention: GatedAttention, q: Tensor, k: Tensor, v: Tensor, state: MegaState, mask: Tensor | None
) -> Tensor:
    position = state.lengths % attention.chunk
    for past, new in ((state.keys, k), (state.values, v)):
        at = position.view(-1, 1, 1).expand(-1, 1, past.shape[-1])
        new = new.to(past.dtype)
        past.scatter_(1, at, new if mask is None else torch.where(mask.unsqueeze(-1), past.gather(1, at), new))
    state.lengths += 1 if mask is None else (~mask).sum(1)
    return attention.attend_one(q, state.keys.to(q.dtype), state.values.to(q.dtype), position)
