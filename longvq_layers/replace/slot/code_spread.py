"""The spread of the keys of a code, as one more dimension of queries and codewords.

    mean of exp(scale q·k) over the keys k of code s  ≈  exp(scale q·C_s + ½ scale² σ_s² ‖q'‖² / D),   q' = q M^-½

σ_s² is the mean of ‖k' − C'_s‖² over these keys, with k' and C' in the metric. The score is scale times the product of
query and codeword. So the extra dimension is (½ scale ‖q'‖² / D) in the query and σ_s² in the codeword.
"""

import torch
from torch import Tensor

from longvq_layers.layers.codebook.operations import code_sums, pick

_FEW_KEYS = 1e-6  # a code with a smaller moving count has no spread yet


def extend_query(q: Tensor, from_metric: Tensor, gain: Tensor, scale: float) -> Tensor:
    """q (B, H, L, D), from_metric (Hkv, D, D) and gain (H,) -> (B, H, L, D + 1)."""
    group = q.shape[1] // from_metric.shape[0]
    per_head = from_metric.repeat_interleave(group, dim=0) if group > 1 else from_metric
    square = (q.to(per_head.dtype) @ per_head).square().sum(-1, keepdim=True)  # ‖q'‖², (B, H, L, 1)
    return torch.cat([q, (0.5 * scale / q.shape[-1] * gain[:, None, None] * square).to(q.dtype)], dim=-1)


def extend_codebook(codebook: Tensor, spread: Tensor) -> Tensor:
    """codebook (…, Hkv, S, D) and spread (…, Hkv, S) -> (…, Hkv, S, D + 1)."""
    return torch.cat([codebook, spread.unsqueeze(-1)], dim=-1)


def mean_spread(sums: Tensor, counts: Tensor) -> Tensor:
    """σ_s² from moving sums and counts, both (Hkv, S)."""
    return sums / counts.clamp(min=_FEW_KEYS)


def spread_sums(keys: Tensor, codes: Tensor, table: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of ‖k' − C'_s‖² and number of keys per code, over the unmasked finite keys.

    Args:
        keys: (B, Hkv, L, D) in the metric.
        codes: (B, Hkv, L) of the keys.
        table: (Hkv, S, D).
        key_padding_mask: (B, L) bool, True = ignore, or None.

    Returns:
        sums (Hkv, S, 1) and counts (Hkv, S).
    """
    valid = keys.isfinite().all(-1)
    if key_padding_mask is not None:
        valid = valid & ~key_padding_mask[:, None, :]
    keys, codes, valid = (x.transpose(0, 1).flatten(1, 2) for x in (keys, codes, valid))
    error = (keys - pick(table, codes)).square().sum(-1, keepdim=True)
    return code_sums(torch.where(valid.unsqueeze(-1), error, 0), codes, valid, table.shape[1])
