"""Steps of causal vector-quantised attention by their recurrence: row by row, token by token."""

import torch
from torch import Tensor

from longvq_layers.ops._attention_inputs import AttentionStepInputs
from longvq_layers.ops._attention_options import Activation
from longvq_layers.ops.reference.vq import laplace
from longvq_layers.ops.vq_state import VQAttentionState


def vq_attention_step(inputs: AttentionStepInputs, state: VQAttentionState, scale: float, activation: int) -> Tensor:
    """Plain form of :func:`longvq_layers.ops.vq_attention_step`; the caller has checked all arguments."""
    device_type = inputs.q.device.type
    kind = device_type if torch.amp.is_autocast_available(device_type) else "cpu"  # the meta device has no autocast
    with torch.autocast(kind, enabled=False):
        return _steps(inputs, state, scale, activation)


def _steps(inputs: AttentionStepInputs, state: VQAttentionState, scale: float, activation: int) -> Tensor:
    q, k, v, codebook, codes, bias, key_padding_mask, far_q, _ = inputs
    assert codes is not None
    far_sums, far_counts, ring_codes, ring_keys, ring_values, lengths = state.tensors()
    out = v.new_zeros(*q.shape[:3], v.shape[3])
    q, k, v = (x.to(far_sums.dtype) for x in (q, k, v))
    far_q = q if far_q is None else far_q.to(far_sums.dtype)
    group, window, reach, exact = q.shape[1] // k.shape[1], state.window, state.reach, state.keeps_keys
    head = torch.arange(k.shape[1], device=q.device)
    for row in range(q.shape[0]):
        sums, counts = far_sums[row], far_counts[row]
        for t in range(q.shape[2]):
            if key_padding_mask is not None and key_padding_mask[row, t]:
                continue
            position = int(lengths[row])
            key, value, code = k[row, :, t], v[row, :, t], codes[row, :, t]

            # Without a window the token itself is far at once.
            if window == 0:
                sums[head, code] += value
                counts[head, code] += 1

            # Keys inside the window by their offset: the token itself, then the ring from the newest to the oldest.
            offsets = range(1, min(position, reach) + 1)
            slots = [(position - offset) % reach for offset in offsets]
            own = slice(0, 1 if window else 0)
            near_codes = torch.cat([code[:, None][:, own], ring_codes[row][:, slots]], 1)  # (Hkv, N)
            near_values = torch.cat([value[:, None][:, own], ring_values[row][:, slots]], 1)  # (Hkv, N, E)
            near_keys = codebook[head[:, None], near_codes]
            if exact:
                near_keys = torch.cat([key[:, None], ring_keys[row][:, slots]], 1)  # (Hkv, N, D)

            query = q[row, :, t].unflatten(0, (-1, group))  # (Hkv, G, D)
            far_query = far_q[row, :, t].unflatten(0, (-1, group))  # (Hkv, G, F)
            factor = scale if activation == Activation.SOFTMAX else 1 / (position + 1)
            near = (query if exact else far_query) @ near_keys.transpose(1, 2) * factor
            if bias is not None:
                near = near + bias[:, : near.shape[2]].unflatten(0, (-1, group))
            far = far_query @ codebook.transpose(1, 2) * factor  # (Hkv, G, S)
            # Each far code counts as many times as it has keys; their values are summed already.
            score, one = torch.cat([far, near], 2), counts.new_ones(len(counts), near.shape[2])
            number = torch.cat([counts, one], 1)[:, None]
            if activation == Activation.SOFTMAX:
                score = score.masked_fill(number == 0, -torch.inf)
                weight = (score - score.amax(-1, keepdim=True)).exp()
                weight = weight / (weight * number).sum(-1, keepdim=True)
            else:
                weight = laplace(score)
            out[row, :, t] = (weight @ torch.cat([sums, near_values], 1)).flatten(0, 1).to(out.dtype)

            # The key that leaves the window becomes far.
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
