"""The next tokens of causal vector-quantised attention, over a state of constant size.

Tokens are processed in blocks. A block attends to keys before the ring through their codes and the sums of their
values. Each key of the ring and of the block itself gets its own score. Then the tokens of the block are added to the
state. The rows of a batch may be at different positions. The ring is read from the oldest key to the newest, so that
the offsets between queries and keys are the same in all rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longvq_layers.ops._attention_inputs import AttentionStepInputs
from longvq_layers.ops._attention_options import Activation
from longvq_layers.ops.torch.elementwise import laplace
from longvq_layers.ops.torch.far_field import segment_sum
from longvq_layers.ops.torch.tokens import take, tokens_first
from longvq_layers.ops.vq_state import VQAttentionState

_BLOCK = 256  # tokens


def vq_attention_step(inputs: AttentionStepInputs, state: VQAttentionState, scale: float, activation: int) -> Tensor:
    """The output (B, H, T, E) in the dtype of ``v``; ``state`` is updated in place."""
    q, k, v, codebook, codes, bias, key_padding_mask, far_q, far_k = inputs
    batch, heads, length, _ = q.shape
    out = v.new_empty(batch, heads, length, v.shape[3])
    if out.numel() == 0:
        return out
    with torch.autocast(q.device.type, enabled=False):
        if codes is None:
            codes = torch.ops.longvq_torch.vq_assign(k if far_k is None else far_k, codebook)
        tokens = [q, k, v, codes] if far_q is None else [q, k, v, codes, far_q]
        order = None if key_padding_mask is None else tokens_first(key_padding_mask)
        for first in range(0, length, _BLOCK):
            # `order` puts the masked tokens of each row last, so a block can have them only at its end.
            if key_padding_mask is None or order is None:
                taken = slice(first, min(first + _BLOCK, length))
                block = _Block(*(x[:, :, taken] for x in tokens))
                valid = q.new_ones(batch, block.q.shape[2], dtype=torch.bool)
                out[:, :, taken] = _attend(block, valid, codebook, bias, state, scale, activation)
            else:
                index = order[:, first : first + _BLOCK]
                valid = ~key_padding_mask.gather(1, index)
                result = _attend(
                    _Block(*(take(x, index) for x in tokens)), valid, codebook, bias, state, scale, activation
                ).to(v.dtype)
                index = index[:, None, :, None].expand_as(result)
                out.scatter_(2, index, result.masked_fill_(~valid[:, None, :, None], 0))
    return out


class _Block(NamedTuple):
    """Some tokens of every row."""

    q: Tensor
    k: Tensor
    v: Tensor
    codes: Tensor
    far_q: Tensor | None = None


def _attend(
    block: _Block,
    valid: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    state: VQAttentionState,
    scale: float,
    activation: int,
) -> Tensor:
    """The output (B, H, T, E) of a block. Its ``valid`` tokens (B, T) come first in each row; the state gets them."""
    precise, kv_heads = state.dtype, block.k.shape[1]
    group, rows = block.q.shape[1] // kv_heads, block.q.shape[2]
    q, k, v = (x.to(precise) for x in (block.q, block.k, block.v))
    ignored = ~valid[:, None, :, None]
    k, v = k.masked_fill(ignored, 0), v.masked_fill(ignored, 0)  # padding may hold anything, even NaN

    # Columns: the R keys of the ring, oldest first, then the keys of the block.
    old = _slots(state, state.lengths - state.reach)  # (B, R)
    codes = torch.cat([take(state.ring_codes, old), block.codes], 2)  # (B, Hkv, R + T)
    values = torch.cat([take(state.ring_values, old), v], 2)
    keys = torch.cat([take(state.ring_keys, old), k], 2) if state.keeps_keys else None
    column = torch.arange(state.reach + rows, device=q.device)
    exists = torch.cat([state.lengths[:, None] - state.reach + column[: state.reach] >= 0, valid], 1)  # (B, R + T)
    offset = torch.arange(rows, device=q.device)[:, None] + state.reach - column  # (T, R + T) query − key
    in_window = (offset >= 0) & (offset < state.window)

    if activation == Activation.SOFTMAX:
        factor = torch.full((1, 1), scale, dtype=precise, device=q.device)
    else:
        factor = 1 / (state.lengths[:, None] + torch.arange(1, rows + 1, device=q.device)).to(precise)
    factor = factor[:, None, :, None]
    q = (q * factor).unflatten(1, (kv_heads, group)).flatten(2, 3)  # (B, Hkv, G·T, D)
    far_q = q
    if block.far_q is not None:
        far_q = (block.far_q.to(precise) * factor).unflatten(1, (kv_heads, group)).flatten(2, 3)
    far = far_q @ codebook.transpose(1, 2)  # (B, Hkv, G·T, S)
    near = far.gather(3, codes.unsqueeze(2).expand(-1, -1, far.shape[2], -1))  # scores of the codewords of near keys
    near = near.unflatten(2, (group, rows))
    if keys is not None:
        near = torch.where(in_window, (q @ keys.transpose(2, 3)).view_as(near), near)
    if bias is not None:
        table = bias.unflatten(0, (kv_heads, group))[:, :, offset.clamp(0, state.window - 1)]
        near = near + table * in_window
    allowed = (offset >= 0) & exists[:, None, None, None]  # (B, 1, 1, T, R + T)
    near = near.masked_fill(~allowed, -torch.inf).flatten(2, 3)

    if activation == Activation.SOFTMAX:
        counts = state.far_counts.unsqueeze(2)
        far = far.masked_fill(counts == 0, -torch.inf)
        largest = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True))
        far, near = far.sub_(largest).exp_(), near.sub_(largest).exp_()
        total = (far * counts).sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
        out = (far @ state.far_sums + near @ values) / total
    else:
        out = laplace(far) @ state.far_sums + laplace(near) @ values
    _advance(state, codes, keys, values, exists, valid.sum(1))
    return out.unflatten(2, (group, rows)).flatten(1, 2)


def _slots(state: VQAttentionState, position: Tensor) -> Tensor:
    """(B,) -> (B, R): the slots of R positions, the first at ``position``."""
    return (position[:, None] + torch.arange(state.reach, device=position.device)) % max(state.reach, 1)


def _advance(
    state: VQAttentionState, codes: Tensor, keys: Tensor | None, values: Tensor, exists: Tensor, new: Tensor
) -> None:
    """Move the state on by ``new`` (B,) tokens. The columns are those of ``_attend``, (…, R + T).

    The first ``new`` columns leave the window, and the next R columns become the ring.
    """
    batch, heads, num_codes, width = state.far_sums.shape
    column = torch.arange(codes.shape[2], device=codes.device)
    leaves = (exists & (column < new[:, None]))[:, None].expand_as(codes)
    pair = torch.arange(batch * heads, device=codes.device).view(batch, heads, 1)
    segment = (pair * num_codes + codes).reshape(-1)
    sums = segment_sum((values * leaves.unsqueeze(-1)).reshape(-1, width), segment, batch * heads * num_codes)
    counts = segment_sum(leaves.reshape(-1).long(), segment, batch * heads * num_codes)
    state.far_sums += sums.view_as(state.far_sums)
    state.far_counts += counts.view_as(state.far_counts)

    kept = new[:, None] + torch.arange(state.reach, device=codes.device)
    slots = _slots(state, state.lengths + new - state.reach)[:, None].expand_as(state.ring_codes)
    state.ring_codes.scatter_(2, slots, take(codes, kept))
    state.ring_values.scatter_(2, slots.unsqueeze(-1).expand_as(state.ring_values), take(values, kept))
    if keys is not None:
        state.ring_keys.scatter_(2, slots.unsqueeze(-1).expand_as(state.ring_keys), take(keys, kept))
    state.lengths += new
