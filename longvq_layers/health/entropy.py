"""How spread out attention over keys, quantised or not, is, for a few queries, from the dense definition."""

import math

import torch
from torch import Tensor

from longvq_layers import ops
from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.attention.dense import DenseAttention
from longvq_layers.layers.common.context import no_autocast
from longvq_layers.ops.reference.vq import laplace

_SEQUENCES = 8  # of a batch that are looked at: their keys are looked up once more


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
    """The mean entropy of attention rows, as a share of the largest possible one.

        h_i = −Σ_j w_ij log w_ij / log n_i        w_ij normalised over the n_i keys that query i may see

    1 = all keys count alike, 0 = one key takes it all. Rows with less than two keys have no entropy and are left out.
    The rows are taken evenly from the unmasked positions of up to 8 sequences, always the same ones; their scores are
    those of the dense definition with the current codes, in O(queries · L).

    Args:
        attention: what attends; its window, bias, codes and activation are used.
        q: (B, H, L, D) float.
        k: (B, Hkv, L, D).
        key_padding_mask: (B, L) bool, True = ignore.
        cu_seqlens: (N+1,) int32, offsets of documents in one row, see `ops.vq_attention`. Default none.
        far: of swapped attention, what stands for q and k outside the window. Default q and k themselves.
        causal, scale: of this call, default those of `attention`.
        queries: how many rows at most over the batch, default 64.

    Returns:
        (H,) float32 or float64, NaN for no row.

    Source: the failure signature "high entropy in the attention matrix" of LongVQ (arXiv 2404.11163).
    """
    batch, heads, length, width = q.shape
    activation = getattr(attention, "activation", "softmax")
    if not batch or not length:
        return torch.full((heads,), math.nan, device=q.device)
    causal = attention.causal if causal is None else causal
    scale = width**-0.5 if scale is None else scale
    taken = min(batch, _SEQUENCES, queries)
    rows = torch.arange(taken, device=q.device) * batch // taken
    far_q, far_k = (x[rows] for x in ((q, k) if far is None else far))
    q, k = q[rows], k[rows]
    ignored = q.new_zeros(taken, length, dtype=torch.bool) if key_padding_mask is None else key_padding_mask[rows]
    at, valid = _positions(ignored, min(length, queries // taken))  # (P R)
    with no_autocast(q.device):
        precise = torch.promote_types(q.dtype, torch.float32)
        q, far_q = (x.gather(2, at[:, None, :, None].expand(-1, heads, -1, width)).to(precise) for x in (q, far_q))
        k, far_k = k.to(precise), far_k.to(precise)
        near, far = _scores(attention, (q, k), (far_q, far_k), ignored, causal, scale)  # (P H R L), before the scale
        if hasattr(attention, "far_log_weight"):
            seen = (~ignored).cumsum(1).gather(1, at)  # (P R)
            far = far + attention.far_log_weight(seen)[:, None, :, None] / scale
        i, j = at.unsqueeze(-1), torch.arange(length, device=q.device)
        allowed = ~ignored.unsqueeze(1) & ((j <= i) if causal else torch.ones_like(j <= i))  # (P R L)
        if cu_seqlens is not None:
            document = torch.searchsorted(cu_seqlens.to(j.dtype), j, right=True)
            allowed &= document[at].unsqueeze(-1) == document
        count = allowed.sum(-1).unsqueeze(1).unsqueeze(-1).to(precise)  # (P 1 R 1)
        unit = scale if activation == "softmax" else 1 / count.clamp(min=1)
        near, far = near * unit, far * unit
        window = attention.window
        if window:
            offset = i - j if causal else j - i + window - 1
            if attention.window_bias is not None:
                bias = attention.window_bias.to(precise)
                near = near + bias[:, offset.clamp(0, bias.shape[1] - 1)].transpose(0, 1)
            inside = (i - j >= 0) & (i - j < window) if causal else (i - j).abs() < window
            far = torch.where(inside.unsqueeze(1), near, far)
        weight = _normalised(far, allowed.unsqueeze(1), activation)
        entropy = torch.special.entr(weight).sum(-1) / count.squeeze(-1).clamp(min=2).log()  # (P H R)
        counts = (valid.unsqueeze(1) & (count.squeeze(-1) > 1) & (weight.sum(-1) > 0)).to(precise)
        return (entropy * counts).sum((0, 2)) / counts.sum((0, 2))


def _positions(ignored: Tensor, number: int) -> tuple[Tensor, Tensor]:
    # Evenly spaced unmasked positions (P, R) of each sequence, and which of them exist; no synchronisation.
    order = ignored.sort(dim=-1, stable=True).indices  # the unmasked ones first
    present = (~ignored).sum(-1, keepdim=True)
    t = torch.arange(number, device=ignored.device)
    slot = torch.where(present >= number, (2 * t + 1) * present // (2 * number), t)
    return order.gather(1, slot), slot < present


def _scores(
    attention: CodebookAttention | DenseAttention,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    ignored: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    # q (P, H, R, D) and k (P, Hkv, L, D) inside and outside of the window, ignored (P, L) -> q·k̃ of both (P, H, R, L)
    (q, k), (far_q, far_k) = near, far
    group = q.shape[1] // k.shape[1]
    if isinstance(attention, DenseAttention):
        exact = q @ k.repeat_interleave(group, dim=1).transpose(2, 3)
        return exact, exact
    if hasattr(attention, "far_scores"):  # the attention of a swapped model, whose codes are in a metric of their own
        far = attention.far_scores(far_q, far_k, ignored, causal=causal, scale=scale)
    else:
        book = attention.codebook
        table = book.embedding  # learning moves the averages at once, but the codes only in the next call
        codes = ops.vq_assign(k.to(table.dtype), table, backend=book.backend)  # (P Hkv L)
        codes, table = codes.repeat_interleave(group, dim=1), table.to(q.dtype).repeat_interleave(group, dim=0)
        far = (q @ table.transpose(1, 2)).gather(3, codes.unsqueeze(2).expand(-1, -1, q.shape[2], -1))
    if attention.local_keys == "quantized":
        return far, far
    return q @ k.repeat_interleave(group, dim=1).transpose(2, 3), far


def _normalised(score: Tensor, allowed: Tensor, activation: str) -> Tensor:
    # Weights that sum to 1 over the allowed keys, or all 0 where there is none.
    if activation == "softmax":
        score = score.masked_fill(~allowed, -torch.inf).masked_fill(~allowed.any(-1, keepdim=True), 0)
        return score.softmax(-1).masked_fill(~allowed, 0)
    weight = laplace(score).masked_fill(~allowed, 0)
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total > 0, total, 1)
