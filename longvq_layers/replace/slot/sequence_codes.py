"""Codewords per sequence: the mean of the sequence's keys of each code. Attention with these codewords."""

import torch
from torch import Tensor

from longvq_layers import ops


def sequence_means(
    keys: Tensor, codes: Tensor, table: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean of the keys of each code in each sequence, and their mean squared distance to it.

    Args:
        keys: (B, H, L, D).
        codes: (B, H, L) int64 in [0, S).
        table: (H, S, D), used for codes that have no key in a sequence.
        key_padding_mask: (B, L) bool, True = ignore, or None.

    Returns:
        means (B, H, S, D) and spread (B, H, S).
    """
    batch, heads, _, head_dim = keys.shape
    rows, num_codes = batch * heads, table.shape[1]
    row = torch.arange(rows, device=keys.device).view(batch, heads, 1)
    index = codes + row * num_codes
    if key_padding_mask is not None:
        index = torch.where(key_padding_mask[:, None, :], rows * num_codes, index)  # an extra bin, dropped below
    index, keys = index.flatten(), keys.reshape(-1, head_dim)

    def total(x: Tensor) -> Tensor:
        where = index if x.dim() == 1 else index.unsqueeze(-1).expand(-1, head_dim)
        return x.new_zeros(rows * num_codes + 1, *x.shape[1:]).scatter_add_(0, where, x)[:-1]

    squares = keys.square().sum(-1)
    counts, squares, sums = total(torch.ones_like(squares)), total(squares), total(keys)
    share = 1 / counts.clamp(min=1)
    means = sums * share.unsqueeze(-1)
    spread = (squares * share - means.square().sum(-1)).clamp(min=0).masked_fill(counts < 2, 0)
    means = means.view(batch, heads, num_codes, head_dim)
    counts = counts.view(batch, heads, num_codes, 1)
    return torch.where(counts > 0, means, table), spread.view(batch, heads, num_codes)


def vq_attention_by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    key_padding_mask: Tensor | None,
    codes: Tensor,
    far_q: Tensor | None,
    far_k: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    local_keys: str,
    backend: str,
) -> Tensor:
    """`ops.vq_attention` with a codebook (B, Hkv, S, F) per sequence.

    Without padding the sequences become heads of one call. With padding each sequence is a separate call.
    """
    tensors = {"q": q, "k": k, "v": v, "codes": codes, "far_q": far_q, "far_k": far_k}
    given = {name: x for name, x in tensors.items() if x is not None}

    def attend(inputs: dict[str, Tensor], codebook: Tensor, mask: Tensor | None) -> Tensor:
        return ops.vq_attention(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            codebook,
            codes=inputs["codes"],
            far_q=inputs.get("far_q"),
            far_k=inputs.get("far_k"),
            key_padding_mask=mask,
            causal=causal,
            window=window,
            scale=scale,
            local_keys=local_keys,
            backend=backend,
        )

    if key_padding_mask is None and q.shape[0]:
        folded = {name: x.flatten(0, 1).unsqueeze(0) for name, x in given.items()}
        return attend(folded, codebook.flatten(0, 1), None).squeeze(0).unflatten(0, q.shape[:2])
    rows = []
    for row in range(q.shape[0]):
        at = slice(row, row + 1)
        own = {name: x[at] for name, x in given.items()}
        rows.append(attend(own, codebook[row], None if key_padding_mask is None else key_padding_mask[at]))
    return torch.cat(rows) if rows else v.new_zeros(*q.shape[:3], v.shape[3])
