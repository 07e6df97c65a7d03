"""Codes of each sequence by itself: the mean of its keys that chose a code, and attention with those."""

import torch
from torch import Tensor

from longvq_layers import ops


def row_means(keys: Tensor, codes: Tensor, table: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean, and mean squared distance to it, of the keys of each code in each row.

    Args:
        keys: (B, H, L, D).
        codes: (B, H, L) int64 in [0, S).
        table: (H, S, D), for the codes that no key of a row chose.
        key_padding_mask: (B, L) bool, True = ignore, or None.

    Returns:
        means (B, H, S, D) and spread (B, H, S).
    """
    batch, heads, _, width = keys.shape
    rows, num_codes = batch * heads, table.shape[1]
    row = torch.arange(rows, device=keys.device).view(batch, heads, 1)
    index = codes + row * num_codes
    if key_padding_mask is not None:
        index = torch.where(key_padding_mask[:, None, :], rows * num_codes, index)  # one more place, that is dropped
    index, keys = index.flatten(), keys.reshape(-1, width)

    def total(x: Tensor) -> Tensor:
        where = index if x.dim() == 1 else index.unsqueeze(-1).expand(-1, width)
        return x.new_zeros(rows * num_codes + 1, *x.shape[1:]).scatter_add_(0, where, x)[:-1]

    squares = keys.square().sum(-1)
    counts, squares, sums = total(torch.ones_like(squares)), total(squares), total(keys)
    share = 1 / counts.clamp(min=1)
    means = sums * share.unsqueeze(-1)
    spread = (squares * share - means.square().sum(-1)).clamp(min=0).masked_fill(counts < 2, 0)
    means = means.view(batch, heads, num_codes, width)
    counts = counts.view(batch, heads, num_codes, 1)
    return torch.where(counts > 0, means, table), spread.view(batch, heads, num_codes)


def vq_attention_by_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    key_padding_mask: Tensor | None,
    codes: Tensor,
    far_q: Tensor | None = None,
    far_k: Tensor | None = None,
    **options,
) -> Tensor:
    """`ops.vq_attention` with a codebook (B, Hkv, S, F) for each row: without padding rows are heads, else one by one.

    `options` are those of `ops.vq_attention`, without `bias` and `cu_seqlens`.
    """
    tensors = {"q": q, "k": k, "v": v, "codes": codes, "far_q": far_q, "far_k": far_k}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    if key_padding_mask is None and q.shape[0]:
        folded = {name: x.flatten(0, 1).unsqueeze(0) for name, x in tensors.items()}
        output = ops.vq_attention(**folded, codebook=codebook.flatten(0, 1), **options)
        return output.squeeze(0).unflatten(0, q.shape[:2])
    rows = []
    for row in range(q.shape[0]):
        at = slice(row, row + 1)
        own = {name: x[at] for name, x in {**tensors, "key_padding_mask": key_padding_mask}.items()}
        rows.append(ops.vq_attention(**own, codebook=codebook[row], **options))
    return torch.cat(rows) if rows else v.new_zeros(*q.shape[:3], v.shape[3])
