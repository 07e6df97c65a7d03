"""The next piece of causal vector-quantised attention, over a state of constant size.

A block of tokens is attended at once: the codes of the keys before the window through the sums of their values, the
keys of the ring and of the block one by one. Then the block joins the state. Rows may stand at different positions;
the offsets between queries and keys are the same in all of them, as the ring is put in order before it is used.
"""

import torch
from torch import Tensor

from longvq_layers.ops.torch.far_field import segment_sum
from longvq_layers.ops.torch.scores import laplace

_BLOCK = 256  # tokens attended at once


def vq_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    codes: Tensor | None,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    far_sums: Tensor,
    far_counts: Tensor,
    ring_codes: Tensor,
    ring_keys: Tensor,
    ring_values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    activation: str,
) -> Tensor:
    """Output (B, H, T, E) in the dtype of ``v``; the six tensors of the state are updated in place."""
    batch, heads, length, _ = q.shape
    out = v.new_empty(batch, heads, length, v.shape[3])
    if out.numel() == 0:
        return out
    with torch.autocast(q.device.type, enabled=False):
        past = _Past(codebook, far_sums, far_counts, ring_codes, ring_keys, ring_values, lengths, window)
        if codes is None:
            codes = torch.ops.longvq_torch.vq_assign(k, codebook)
        order = None if key_padding_mask is None else key_padding_mask.to(torch.uint8).argsort(dim=1, stable=True)
        for first in range(0, length, _BLOCK):
            # Tokens that count come first in each row, so a block is full, or ends in ones that don't.
            if order is None:
                taken = slice(first, min(first + _BLOCK, length))
                block = [x[:, :, taken] for x in (q, k, v, codes)]
                valid = q.new_ones(batch, block[0].shape[2], dtype=torch.bool)
            else:
                taken = order[:, first : first + _BLOCK]
                block = [_take(x, taken) for x in (q, k, v, codes)]
                valid = ~key_padding_mask.gather(1, taken)
            result = past.attend(*block, valid, bias, scale, activation).to(v.dtype)
            if order is None:
                out[:, :, taken] = result
            else:
                index = taken[:, None, :, None].expand_as(result)
                out.scatter_(2, index, result.masked_fill_(~valid[:, None, :, None], 0))
    return out


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (B, N) of x (B, H, T) or (B, H, T, X)."""
    index = index[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, index if x.dim() == 3 else index.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))


class _Past:
    """The tensors of a state, and what a block does with them."""

    def __init__(self, codebook, far_sums, far_counts, ring_codes, ring_keys, ring_values, lengths, window):
        self.codebook, self.window = codebook, window
        self.far_sums, self.far_counts, self.lengths = far_sums, far_counts, lengths
        self.ring_codes, self.ring_keys, self.ring_values = ring_codes, ring_keys, ring_values
        self.reach, self.exact = max(window - 1, 0), ring_keys.shape[3] > 0

    def attend(self, q, k, v, codes, valid, bias, scale, activation) -> Tensor:
        """Output (B, H, T, E) of a block whose ``valid`` (B, T) tokens come first in each row; these join the past."""
        precise, kv_heads = self.far_sums.dtype, k.shape[1]
        group, rows = q.shape[1] // kv_heads, q.shape[2]
        q, k, v = (x.to(precise) for x in (q, k, v))
        ignored = ~valid[:, None, :, None]
        k, v = k.masked_fill(ignored, 0), v.masked_fill(ignored, 0)  # whatever stands there, even NaN, is not used

        # The ring in order, from R positions before the block, and the block.
        old = self._slots(self.lengths - self.reach)  # (B, R)
        codes = torch.cat([_take(self.ring_codes, old), codes], 2)  # (B, Hkv, R + T)
        values = torch.cat([_take(self.ring_values, old), v], 2)
        keys = torch.cat([_take(self.ring_keys, old), k], 2) if self.exact else None
        column = torch.arange(self.reach + rows, device=q.device)
        exists = torch.cat([self.lengths[:, None] - self.reach + column[: self.reach] >= 0, valid], 1)  # (B, R + T)
        offset = torch.arange(rows, device=q.device)[:, None] + self.reach - column  # (T, R + T) query − key
        in_window = (offset >= 0) & (offset < self.window)

        if activation == "softmax":
            unit = torch.full((1, 1), scale, dtype=precise, device=q.device)
        else:
            unit = 1 / (self.lengths[:, None] + torch.arange(1, rows + 1, device=q.device)).to(precise)
        q = q * unit[:, None, :, None]
        q = q.unflatten(1, (kv_heads, group)).flatten(2, 3)  # (B, Hkv, G·T, D)
        far = q @ self.codebook.transpose(1, 2)  # (B, Hkv, G·T, S)
        near = far.gather(3, codes.unsqueeze(2).expand(-1, -1, far.shape[2], -1))  # the codewords of the near keys
        near = near.unflatten(2, (group, rows))
        if keys is not None:
            near = torch.where(in_window, (q @ keys.transpose(2, 3)).view_as(near), near)
        if bias is not None:
            table = bias.unflatten(0, (kv_heads, group))[:, :, offset.clamp(0, self.window - 1)]
            near = near + table * in_window
        allowed = (offset >= 0) & exists[:, None, None, None]  # (B, 1, 1, T, R + T)
        near = near.masked_fill(~allowed, -torch.inf).flatten(2, 3)

        if activation == "softmax":
            counts = self.far_counts.unsqueeze(2)
            far = far.masked_fill(counts == 0, -torch.inf)
            top = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True))
            far, near = far.sub_(top).exp_(), near.sub_(top).exp_()
            total = (far * counts).sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
            out = (far @ self.far_sums + near @ values) / total
        else:
            out = laplace(far) @ self.far_sums + laplace(near) @ values
        self._advance(codes, keys, values, exists, valid.sum(1))
        return out.unflatten(2, (group, rows)).flatten(1, 2)

    def _slots(self, position: Tensor) -> Tensor:
        """(B,) -> (B, R), slots of R positions from ``position`` on."""
        return (position[:, None] + torch.arange(self.reach, device=position.device)) % max(self.reach, 1)

    def _advance(self, codes: Tensor, keys: Tensor | None, values: Tensor, exists: Tensor, new: Tensor) -> None:
        """Columns as in ``attend``: the first ``new`` (B,) of R + T leave the window, the R after them are the ring."""
        batch, heads, num_codes, width = self.far_sums.shape
        column = torch.arange(codes.shape[2], device=codes.device)
        leaves = (exists & (column < new[:, None]))[:, None].expand_as(codes)
        pair = torch.arange(batch * heads, device=codes.device).view(batch, heads, 1)
        segment = (pair * num_codes + codes).reshape(-1)
        sums = segment_sum((values * leaves.unsqueeze(-1)).reshape(-1, width), segment, batch * heads * num_codes)
        counts = segment_sum(leaves.reshape(-1).long(), segment, batch * heads * num_codes)
        self.far_sums += sums.view_as(self.far_sums)
        self.far_counts += counts.view_as(self.far_counts)

        kept = new[:, None] + torch.arange(self.reach, device=codes.device)
        slots = self._slots(self.lengths + new - self.reach)[:, None].expand_as(self.ring_codes)
        self.ring_codes.scatter_(2, slots, _take(codes, kept))
        self.ring_values.scatter_(2, slots.unsqueeze(-1).expand_as(self.ring_values), _take(values, kept))
        if keys is not None:
            self.ring_keys.scatter_(2, slots.unsqueeze(-1).expand_as(self.ring_keys), _take(keys, kept))
        self.lengths += new
