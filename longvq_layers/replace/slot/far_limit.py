"""Far keys of sequences beyond the training length, as one more dimension of queries and codewords.

In training no query saw more than n = trained_length − W far keys. With many more, far keys would outweigh the keys in
the window. So a query with N > n far keys gives each the weight n / N: log(n / N) is added to its scores.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def far_log_weight(seen: Tensor, trained_length: int, window: int, dtype: torch.dtype) -> Tensor:
    """log(n / N) where N > n, else 0; seen (B, L) is the number of tokens up to and including each query."""
    limit = max(trained_length - window, 1)
    return -((seen - window).to(dtype) / limit).clamp(min=1).log()


def tokens_seen(key_padding_mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Number of tokens up to and including each position, (B or 1, L)."""
    if key_padding_mask is None:
        return torch.arange(1, length + 1, device=device).unsqueeze(0)
    return (~key_padding_mask).cumsum(1)


def extend_query(q: Tensor, log_weight: Tensor, scale: float) -> Tensor:
    """q (B, H, L, F) and log_weight (B or 1, L) -> (B, H, L, F + 1)."""
    column = log_weight[:, None, :, None] / scale
    return torch.cat([q, column.expand(*q.shape[:3], 1).to(q.dtype)], dim=-1)


def extend_codebook(codebook: Tensor) -> Tensor:
    """codebook (…, Hkv, S, F) -> (…, Hkv, S, F + 1), with ones."""
    return F.pad(codebook, (0, 1), value=1.0)
