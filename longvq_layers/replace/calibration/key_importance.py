"""How much attention each key receives: calibration puts more codes where attention looks."""

import torch
from torch import Tensor

_QUERIES = 1024  # at most this many evenly spaced queries represent a longer sequence, so that the cost stays linear
_SCORES = 1 << 24  # scores in memory at once


def attention_received(
    q: Tensor, k: Tensor, real: Tensor, *, window: int = 0, causal: bool = False, scale: float | None = None
) -> Tensor:
    """The attention that each key receives from the queries outside its window, summed over queries.

        r_j = Σ_i p_ij   over the real queries i with |i − j| ≥ W,   p = softmax(scale · q kᵀ) over all allowed keys

    Args:
        q: (B, H, L, D).
        k: (B, Hkv, L, D); the queries of one key-value head are added up.
        real: (B, L) bool, False = padding.
        window: W, default 0: every query counts.
        causal: whether query i sees keys j ≤ i only, default False.
        scale: of the scores, default ``D ** -0.5``.

    Returns:
        (B, Hkv, L), at least float32; 0 for padding.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 50, 8).unbind(0)
        >>> float(attention_received(q, k, torch.ones(1, 50, dtype=torch.bool)).sum().round())  # 4 heads, 50 queries
        200.0
    """
    batch, heads, length, head_dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.to(dtype)
    received = k.new_zeros(k.shape[:3])
    count = min(length, _QUERIES)
    rows = torch.arange(count, device=q.device) * length // max(count, 1)
    position = torch.arange(length, device=q.device)
    for at in rows.split(max(1, _SCORES // max(1, batch * heads * length))):
        grouped = q[:, :, at].to(dtype).unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, T, D)
        scores = grouped @ k.unsqueeze(2).transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
        offset = at.unsqueeze(-1) - position  # (T, L)
        allowed = real[:, None, :] & (offset >= 0) if causal else real[:, None, :].expand(-1, len(at), -1)
        weights = scores.masked_fill(~allowed[:, None, None], -torch.inf).softmax(-1)
        counts = allowed & (offset.abs() >= window) & real[:, at, None]
        # A query without any allowed key has NaN weights; the mask sets them to 0 as well.
        received += weights.masked_fill(~counts[:, None, None], 0).sum((2, 3))
    return received * (length / max(count, 1))
