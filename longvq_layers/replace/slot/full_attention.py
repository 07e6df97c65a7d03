"""Attention to every key: the reference of calibration and distillation."""

import torch.nn.functional as F
from torch import Tensor

from longvq_layers.layers.common.padding import allowed_pairs


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of q (B, H, L, D), k (B, Hkv, L, D), v (B, Hkv, L, E) -> (B, H, L, E).

    key_padding_mask is (B, L) bool, True = ignore. Outputs at padded positions are undefined.
    """
    allowed = None if key_padding_mask is None else allowed_pairs(key_padding_mask, causal)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=allowed,
        is_causal=causal and allowed is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
