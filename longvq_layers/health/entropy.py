"""The entropy of attention, for a few queries, from the dense definition; keys may be quantised or exact."""

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from longvq_layers import ops
from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.attention.dense import DenseAttention
from longvq_layers.layers.common.context import no_autocast
from longvq_layers.ops.reference.vq import laplace

_SEQUENCES = 8  # at most, of a batch; their keys are assigned to codes once more


@runtime_checkable
class _HasFarScores(Protocol):
    """The attention of a swapped model, whose codes are in a metric of their own."""

    def far_scores(self, q: Tensor, k: Tensor, key_padding_mask: Tensor, *, causal: bool, scale: float) -> Tensor:
        """Scores (B, H, R, L) outside the window, not scaled yet."""

    def far_log_weight(self, seen: Tensor) -> Tensor:
        """(B, L), added to the scores of far keys."""


@torch.no_grad()
def attention_entropy(
    attention: CodebookAttention | DenseAttention,
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    far: tuple[Tensor, Tensor] | None = None,
    causal: bool | None = None,
    scale: float | None = None,
    queries: int = 64,
) -> Tensor:
    """The mean entropy of attention rows, relative to the largest possible entropy.

        h_i = −Σ_j w_ij log w_ij / log n_i        w_ij normalised over the n_i keys that query i may see

    1 = all keys have the same weight, 0 = one key has all weight. Rows with fewer than two keys are left out. The rows
    are spread evenly over the unmasked positions of up to 8 sequences, and are the same in every call. Their scores are
    those of the dense definition with the current codes, in O(queries · L).

    Args:
        attention: gives window, bias, codes and activation.
        q: (B, H, L, D) float.
        k: (B, Hkv, L, D).
        key_padding_mask: (B, L) bool, True = ignore.
        cu_seqlens: (N+1,) int32, offsets of documents in one row, see `ops.vq_attention`. Default none.
        far: for swapped attention, q and k outside the window; default `q` and `k`.
        causal, scale: of this call, default those of `attention`.
        queries: rows at most, over the whole batch, default 64.

    Returns:
        (H,) float32 or float64; NaN without a row.

    Source: the failure signature "high entropy in the attention matrix" of LongVQ (arXiv 2404.11163).
    """
    batch, num_heads, length, head_dim = q.shape
    if not batch or not length:
        return torch.full((num_heads,), math.nan, device=q.device)
    activation = getattr(attention, "activation", "softmax")
    causal = attention.causal if causal is None else causal
    scale = head_dim**-0.5 if scale is None else scale
    taken = min(batch, _SEQUENCES, queries)
    rows = torch.arange(taken, device=q.device) * batch // taken
    far_q, far_k = (q, k) if far is None else far
    q, k, far_q, far_k = (x[rows] for x in (q, k, far_q, far_k))
    ignored = q.new_zeros(taken, length, dtype=torch.bool) if key_padding_mask is None else key_padding_mask[rows]
    at, valid = _positions(ignored, min(length, queries // taken))  # (P R)
    with no_autocast(q.device):
        dtype = torch.promote_types(q.dtype, torch.float32)
        index = at[:, None, :, None].expand(-1, num_heads, -1, head_dim)
        q, far_q = (x.gather(2, index).to(dtype) for x in (q, far_q))
        k, far_k = k.to(dtype), far_k.to(dtype)
        near_score, far_score = _scores(attention, (q, k), (far_q, far_k), ignored, causal, scale)  # (P H R L)
        if isinstance(attention, _HasFarScores):
            seen = (~ignored).cumsum(1).gather(1, at)  # (P R)
            far_score = far_score + attention.far_log_weight(seen)[:, None, :, None] / scale
        allowed = _allowed(ignored, at, causal, cu_seqlens)  # (P R L)
        count = allowed.sum(-1).unsqueeze(1).unsqueeze(-1).to(dtype)  # (P 1 R 1)
        unit = scale if activation == "softmax" else 1 / count.clamp(min=1)
        score = _by_window(attention, near_score * unit, far_score * unit, at, causal)
        weight = _normalised(score, allowed.unsqueeze(1), activation)
        entropy = torch.special.entr(weight).sum(-1) / count.squeeze(-1).clamp(min=2).log()  # (P H R)
        counts = (valid.unsqueeze(1) & (count.squeeze(-1) > 1) & (weight.sum(-1) > 0)).to(dtype)
        return (entropy * counts).sum((0, 2)) / counts.sum((0, 2))


def _positions(ignored: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced unmasked positions (P, R) of each sequence, and which of them exist; without synchronisation."""
    order = ignored.sort(dim=-1, stable=True).indices  # unmasked positions first
    present = (~ignored).sum(-1, keepdim=True)
    t = torch.arange(number, device=ignored.device)
    slot = torch.where(present >= number, (2 * t + 1) * present // (2 * number), t)
    return order.gather(1, slot), slot < present


def _allowed(ignored: Tensor, at: Tensor, causal: bool, cu_seqlens: Tensor | None) -> Tensor:
    """(P, R, L) keys that each query may see."""
    i, j = at.unsqueeze(-1), torch.arange(ignored.shape[1], device=ignored.device)
    allowed = ~ignored.unsqueeze(1) & ((j <= i) if causal else torch.ones_like(j <= i))
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens.to(j.dtype), j, right=True)
        allowed &= document[at].unsqueeze(-1) == document
    return allowed


def _scores(
    attention: CodebookAttention | DenseAttention,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    ignored: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Scores inside and outside of the window, both (P, H, R, L) and not scaled yet.

    Args:
        attention: with the codes.
        near: q (P, H, R, D) and k (P, Hkv, L, D) inside the window.
        far: q and k outside the window.
        ignored: (P, L), True at padding.
        causal, scale: of this call.
    """
    (q, k), (far_q, far_k) = near, far
    group = q.shape[1] // k.shape[1]
    if isinstance(attention, DenseAttention):
        exact = q @ k.repeat_interleave(group, dim=1).transpose(2, 3)
        return exact, exact
    if isinstance(attention, _HasFarScores):
        far_score = attention.far_scores(far_q, far_k, ignored, causal=causal, scale=scale)
    else:
        book = attention.codebook
        table = book.embedding  # learning updates the averages at once, but the codes only in the next call
        codes = ops.vq_assign(k.to(table.dtype), table, backend=book.backend)  # (P Hkv L)
        codes, table = codes.repeat_interleave(group, dim=1), table.to(q.dtype).repeat_interleave(group, dim=0)
        far_score = (q @ table.transpose(1, 2)).gather(3, codes.unsqueeze(2).expand(-1, -1, q.shape[2], -1))
    if attention.local_keys == "quantized":
        return far_score, far_score
    return q @ k.repeat_interleave(group, dim=1).transpose(2, 3), far_score


def _by_window(
    attention: CodebookAttention | DenseAttention, near_score: Tensor, far_score: Tensor, at: Tensor, causal: bool
) -> Tensor:
    """(P, H, R, L): the near score with the window bias inside the window, the far score outside."""
    window = attention.window
    if not window:
        return far_score
    i, j = at.unsqueeze(-1), torch.arange(far_score.shape[-1], device=at.device)
    if attention.window_bias is not None:
        offset = i - j if causal else j - i + window - 1
        bias = attention.window_bias.to(near_score.dtype)
        near_score = near_score + bias[:, offset.clamp(0, bias.shape[1] - 1)].transpose(0, 1)
    inside = (i - j >= 0) & (i - j < window) if causal else (i - j).abs() < window
    return torch.where(inside.unsqueeze(1), near_score, far_score)


def _normalised(score: Tensor, allowed: Tensor, activation: str) -> Tensor:
    """Weights that sum to 1 over the allowed keys; all 0 if no key is allowed."""
    if activation == "softmax":
        score = score.masked_fill(~allowed, -torch.inf).masked_fill(~allowed.any(-1, keepdim=True), 0)
        return score.softmax(-1).masked_fill(~allowed, 0)
    weight = laplace(score).masked_fill(~allowed, 0)
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total > 0, total, 1)
