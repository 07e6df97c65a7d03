"""Forward of vector-quantised attention in linear time.

Keys within the window's reach of a block of queries are attended one by one, all others through the codebook:
``Σ_{j far} exp(q·Ĉ_{z_j}) v_j = Σ_s n_s exp(q·C_s) m_s`` with ``n_s`` the number and ``m_s`` the mean value of the far
keys of code s, which is ordinary attention over S more keys with an additive bias ``log n_s``
(Lingle 2023, Transformer-VQ, theorem 3.7; LongVQ 2024, section 4.2).
"""

import torch
from torch import Tensor

from longvq_layers.ops._packed import documents, part
from longvq_layers.ops.torch.scores import Options, Scores, laplace


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
) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, E) in the dtype of ``v``, and log-normalisers (B, H, L) for the backward."""
    if q.numel() == 0:
        precise = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_zeros(q.shape[:3], dtype=precise)
    if cu_seqlens is not None:
        options = (scale, causal, window, activation, local_keys, key_grad)
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for at in documents("vq_attention", cu_seqlens, q.shape[2]):
            rows, mask = (part(x, at, 2) for x in (q, k, v)), part(key_padding_mask, at, 1)
            out[:, :, at], lse[:, :, at] = vq_attention(*rows, codebook, part(codes, at, 2), bias, mask, None, *options)
        return out, lse
    options = Options(scale, causal, window, activation, local_keys, key_grad)
    with torch.autocast(q.device.type, enabled=False):
        s = Scores(q, k, v, codebook, codes, bias, key_padding_mask, options)
        out = s.v.new_empty(s.batch, s.kv_heads, s.group, s.length, s.value_width)
        lse = s.v.new_zeros(s.batch, s.kv_heads, s.group, s.length, 1)
        for block in range(s.blocks.count):
            rows, keys = s.blocks.rows(block), s.blocks.near(block)
            q_block = s.rows_of(s.q, rows)
            near = s.near(q_block, s.near_codewords(keys), rows, keys)
            far = s.far(q_block, block)
            if activation == "softmax":
                top = far.amax(-1, keepdim=True)
                if near.shape[-1]:
                    top = torch.maximum(top, near.amax(-1, keepdim=True))
                top.masked_fill_(top == -torch.inf, 0)  # no allowed key at all: every weight is exp(−inf) = 0
                near, far = near.sub_(top).exp_(), far.sub_(top).exp_()
                total = near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True)
                none = total == 0
                lse_block = top + total.log()
                lse[..., rows, :] = lse_block.masked_fill_(none, torch.inf).view(*lse.shape[:3], -1, 1)
                result = near @ s.v[:, :, keys] + far @ s.far_values[s.far_index(block)]
                result /= total.masked_fill_(none, 1)
            else:
                result = laplace(near) @ s.v[:, :, keys] + laplace(far) @ s.far_values[s.far_index(block)]
            out[..., rows, :] = result.view(*out.shape[:3], -1, s.value_width)
        out, lse = out.flatten(1, 2), lse.flatten(1, 2).squeeze(-1)
        if key_padding_mask is not None:
            out.masked_fill_(key_padding_mask[:, None, :, None], 0)
        return out.to(v.dtype), lse
