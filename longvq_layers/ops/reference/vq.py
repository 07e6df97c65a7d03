"""Vector-quantised attention by its definition: every pair of positions, O(L²) time and memory.

Differentiable by autograd. A straight-through estimator is written ``value + (x - x.detach())``.
"""

import math

import torch
from torch import Tensor

from longvq_layers.ops._attention_inputs import AttentionInputs
from longvq_layers.ops._attention_options import Activation, AttentionOptions, KeyGrad, LocalKeys


def vq_assign(k: Tensor, codebook: Tensor) -> Tensor:
    """Codes (B, H, L), ``argmin_s ‖k − C_s‖²``, of keys (B, H, L, D) in a codebook (H, S, D); ties to the lowest s."""
    precise = torch.promote_types(k.dtype, torch.float32)
    k, codebook = k.detach().to(precise), codebook.detach().to(precise)
    distance = (k.unsqueeze(3) - codebook[:, None]).square().sum(-1)  # (B H L S)
    return distance.argmin(-1)


def laplace(x: Tensor) -> Tensor:
    """Mega's attention function, ``½(1 + erf((x − μ) / (σ√2)))`` with ``μ = √½``, ``σ = √(1/4π)`` (eq. 16)."""
    mu, sigma = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
    return 0.5 * (1 + torch.erf((x - mu) / (sigma * math.sqrt(2))))


def vq_attention(inputs: AttentionInputs, options: AttentionOptions) -> Tensor:
    """Dense form of :func:`longvq_layers.ops.vq_attention`; the caller has checked all arguments."""
    if inputs.cu_seqlens is not None and inputs.cu_seqlens.shape[0] > 1:  # else there are no documents and L = 0
        return torch.cat([vq_attention(document, options) for _, document in inputs.documents()], dim=2)
    q, k, v, codebook, codes, bias, key_padding_mask, _, far_q, far_k = inputs
    scale, causal, window, activation, local_keys, key_grad = options
    out_dtype = v.dtype
    precise = inputs.precise
    q, k, v, codebook = (x.to(precise) for x in (q, k, v, codebook.detach()))
    far_q, far_k = (q, k) if far_q is None or far_k is None else (far_q.to(precise), far_k.to(precise))
    batch, heads, length, _ = q.shape
    kv_heads, num_codes, far_dim = codebook.shape
    ignored = k.new_zeros(batch, length, dtype=torch.bool) if key_padding_mask is None else key_padding_mask

    # The keys of pairs inside the window ...
    k_hat = torch.stack([codebook[h][codes[:, h]] for h in range(kv_heads)], dim=1)  # (B Hkv L F)
    local = k if local_keys == LocalKeys.EXACT else k_hat + (k - k.detach())  # difference: value 0, gradient 1
    # ... and of pairs outside: the codewords. The keys of a code share the gradient of its codeword.
    if key_grad == KeyGrad.WINDOW:
        far = torch.where(codes.unsqueeze(-1) >= 0, k_hat, far_k)  # always k_hat: the gradient of far_k is 0, not None
    else:
        straight = far_k - far_k.detach()
        member = torch.nn.functional.one_hot(codes, num_codes).to(precise)  # (B Hkv L S)
        member = member * (~ignored)[:, None, :, None]
        share = member.transpose(2, 3) @ straight / member.sum(2).clamp(min=1).unsqueeze(-1)  # (B Hkv S F)
        far = k_hat + share.gather(2, codes.unsqueeze(-1).expand(-1, -1, -1, far_dim))

    group = heads // kv_heads
    local, far, v = (x.repeat_interleave(group, dim=1) for x in (local, far, v))

    i, j = torch.arange(length, device=q.device)[:, None], torch.arange(length, device=q.device)[None, :]
    in_window = (i - j < window) & (i - j >= 0) if causal else (i - j).abs() < window
    allowed = (~ignored)[:, None, None, :] & ((j <= i) if causal else torch.ones_like(j <= i))  # (B 1 L L)
    count = allowed.sum(-1, keepdim=True).clamp(min=1).to(precise)

    factor = scale if activation == Activation.SOFTMAX else 1 / count
    score_local = q @ local.transpose(2, 3) * factor
    if bias is not None and window > 0:
        column = (i - j) if causal else (j - i + window - 1)
        score_local = score_local + bias.to(precise)[:, column.clamp(0, bias.shape[1] - 1)]
    score = torch.where(in_window, score_local, far_q @ far.transpose(2, 3) * factor)

    if activation == Activation.SOFTMAX:
        # Softmax gives NaN for a query without allowed keys. So the query gets finite scores here, and weight 0 below.
        weight = score.masked_fill(~allowed, -torch.inf).masked_fill(~allowed.any(-1, keepdim=True), 0).softmax(-1)
    else:
        weight = laplace(score)
    weight = weight * allowed
    out = weight @ v
    return out.masked_fill(ignored[:, None, :, None], 0).to(out_dtype)
