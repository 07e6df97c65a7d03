"""One step of causal vector-quantised attention by its recurrence, token by token and row by row."""

import torch
from torch import Tensor

from longvq_layers.ops.reference.vq import laplace


def vq_attention_step(q: Tensor, *others: Tensor | float | int | str | None) -> Tensor:
    """Plain form of :func:`longvq_layers.ops.vq_attention_step`; all arguments are checked by the caller."""
    kind = q.device.type if torch.amp.is_autocast_available(q.device.type) else "cpu"  # the meta device has none
    with torch.autocast(kind, enabled=False):
        return _steps(q, *others)


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    codes: Tensor,
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
    out = v.new_zeros(*q.shape[:3], v.shape[3])
    q, k, v = (x.to(far_sums.dtype) for x in (q, k, v))
    group, reach, exact = q.shape[1] // k.shape[1], max(window - 1, 0), ring_keys.shape[3] > 0
    head = torch.arange(k.shape[1], device=q.device)
    for row in range(q.shape[0]):
        sums, counts = far_sums[row], far_counts[row]
        for t in range(q.shape[2]):
            if key_padding_mask is not None and key_padding_mask[row, t]:
                continue
            position = int(lengths[row])
            key, value, code = k[row, :, t], v[row, :, t], codes[row, :, t]

            # The key that leaves the window joins the far field: without a window the token itself.
            if window == 0:
                sums[head, code] += value
                counts[head, code] += 1

            # Keys of the window by their offset: the token itself, then the ring backwards.
            offsets = range(1, min(position, reach) + 1)
            slots = [(position - offset) % reach for offset in offsets]
            own = slice(0, 1 if window else 0)
            near_codes = torch.cat([code[:, None][:, own], ring_codes[row][:, slots]], 1)  # (Hkv, N)
            near_values = torch.cat([value[:, None][:, own], ring_values[row][:, slots]], 1)  # (Hkv, N, E)
            near_keys = codebook[head[:, None], near_codes]
            if exact:
                near_keys = torch.cat([key[:, None], ring_keys[row][:, slots]], 1)  # (Hkv, N, D)

            query = q[row, :, t].unflatten(0, (-1, group))  # (Hkv, G, D)
            unit = scale if activation == "softmax" else 1 / (position + 1)
            near = query @ near_keys.transpose(1, 2) * unit
            if bias is not None:
                near = near + bias[:, : near.shape[2]].unflatten(0, (-1, group))
            far = query @ codebook.transpose(1, 2) * unit  # (Hkv, G, S)
            # A code stands for as many keys as it has: their values are summed up already.
            score, one = torch.cat([far, near], 2), counts.new_ones(len(counts), near.shape[2])
            number = torch.cat([counts, one], 1)[:, None]
            if activation == "softmax":
                score = score.masked_fill(number == 0, -torch.inf)
                weight = (score - score.amax(-1, keepdim=True)).exp()
                weight = weight / (weight * number).sum(-1, keepdim=True)
            else:
                weight = laplace(score)
            out[row, :, t] = (weight @ torch.cat([sums, near_values], 1)).flatten(0, 1).to(out.dtype)

            if window == 1:
                sums[head, code] += value
                counts[head, code] += 1
            elif window > 1:
                slot = position % reach
                if position >= reach:
                    sums[head, ring_codes[row, :, slot]] += ring_values[row, :, slot]
                    counts[head, ring_codes[row, :, slot]] += 1
                ring_codes[row, :, slot], ring_values[row, :, slot] = code, value
                if exact:
                    ring_keys[row, :, slot] = key
            lengths[row] += 1
    return out
