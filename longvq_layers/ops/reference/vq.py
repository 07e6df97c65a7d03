"""Vector-quantised attention by its definition: every pair of positions, O(L²) time and memory.

Differentiable by autograd; the straight-through estimators are written out as ``value + (x - x.detach())``.
"""

import math

import torch
from torch import Tensor

from longvq_layers.ops._packed import documents, part


def vq_assign(k: Tensor, codebook: Tensor) -> Tensor:
    """``argmin_s ‖k − C_s‖²`` of keys (B, H, L, D) in a codebook (H, S, D): codes (B, H, L), ties to the lowest s."""
    precise = torch.promote_types(k.dtype, torch.float32)
    k, codebook = k.detach().to(precise), codebook.detach().to(precise)
    distance = (k.unsqueeze(3) - codebook[:, None]).square().sum(-1)  # (B H L S)
    return distance.argmin(-1)


def laplace(x: Tensor) -> Tensor:
    """Mega's attention function, ``½(1 + erf((x − μ) / (σ√2)))`` with ``μ = √½``, ``σ = √(1/4π)`` (eq. 16)."""
    mu, sigma = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
    return 0.5 * (1 + torch.erf((x - mu) / (sigma * math.sqrt(2))))


def vq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    activation: str,
    local_keys: str,
    key_grad: str,
    near_dim: int,
) -> Tensor:
    """Dense form of :func:`longvq_layers.ops.vq_attention`; all arguments are checked by the caller.

    `near_dim` > 0: the first columns of q and k are q and k of that function, the others its far_q and far_k.
    """
    if cu_seqlens is not None and cu_seqlens.shape[0] > 1:  # else there is no document, and no position
        options = (scale, causal, window, activation, local_keys, key_grad, near_dim)
        parts = []
        for at in documents("vq_attention", cu_seqlens, q.shape[2]):
            rows, mask = (part(x, at, 2) for x in (q, k, v)), part(key_padding_mask, at, 1)
            parts.append(vq_attention(*rows, codebook, part(codes, at, 2), bias, mask, None, *options))
        return torch.cat(parts, dim=2)
    out_dtype = v.dtype
    precise = torch.promote_types(q.dtype, torch.float32)
    q, k, v, codebook = (x.to(precise) for x in (q, k, v, codebook.detach()))
    batch, heads, length, _ = q.shape
    kv_heads, num_codes, width = codebook.shape
    ignored = k.new_zeros(batch, length, dtype=torch.bool) if key_padding_mask is None else key_padding_mask

    # What a key is worth to a query inside the window ...
    k_hat = torch.stack([codebook[h][codes[:, h]] for h in range(kv_heads)], dim=1)  # (B Hkv L D)
    straight = k - k.detach()  # value 0, gradient 1
    local = k if local_keys == "exact" else k_hat + straight
    # ... and outside: the codeword, whose gradient the keys of that code share.
    far = k_hat
    if key_grad == "cluster":
        member = torch.nn.functional.one_hot(codes, num_codes).to(precise)  # (B Hkv L S)
        member = member * (~ignored)[:, None, :, None]
        share = member.transpose(2, 3) @ straight / member.sum(2).clamp(min=1).unsqueeze(-1)  # (B Hkv S D)
        far = k_hat + share.gather(2, codes.unsqueeze(-1).expand(-1, -1, -1, width))

    group = heads // kv_heads
    local, far, v = (x.repeat_interleave(group, dim=1) for x in (local, far, v))

    i, j = torch.arange(length, device=q.device)[:, None], torch.arange(length, device=q.device)[None, :]
    in_window = (i - j < window) & (i - j >= 0) if causal else (i - j).abs() < window
    allowed = (~ignored)[:, None, None, :] & ((j <= i) if causal else torch.ones_like(j <= i))  # (B 1 L L)
    count = allowed.sum(-1, keepdim=True).clamp(min=1).to(precise)

    unit = scale if activation == "softmax" else 1 / count
    inside, outside = slice(0, near_dim or None), slice(near_dim, None)  # columns
    score_local = q[..., inside] @ local[..., inside].transpose(2, 3) * unit
    if bias is not None and window > 0:
        column = (i - j) if causal else (j - i + window - 1)
        score_local = score_local + bias.to(precise)[:, column.clamp(0, bias.shape[1] - 1)]
    score = torch.where(in_window, score_local, q[..., outside] @ far[..., outside].transpose(2, 3) * unit)

    if activation == "softmax":
        # A row without any allowed key would be NaN: give it finite scores here, zero weight below.
        weight = score.masked_fill(~allowed, -torch.inf).masked_fill(~allowed.any(-1, keepdim=True), 0).softmax(-1)
    else:
        weight = laplace(score)
    weight = weight * allowed
    out = weight @ v
    return out.masked_fill(ignored[:, None, :, None], 0).to(out_dtype)
