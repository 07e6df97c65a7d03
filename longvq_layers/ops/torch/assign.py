"""Search for the nearest codewords, a block of keys at a time."""

import torch
from torch import Tensor

_BLOCK_SCORES = 1 << 21  # number of scores of a block: 8 MiB of float32, which fit into a last-level cache


def vq_assign(k: Tensor, codebook: Tensor) -> Tensor:
    """Codes (B, H, L) of keys (B, H, L, D) in a codebook (H, S, D).

    ``argmin ‖k − C‖² = argmax k·C − ½‖C‖²``. argmax returns the first maximum, so of equal distances the lowest code
    wins. But a matrix product may round equal columns differently. So at the end each code is replaced by the lowest
    code with an equal codeword.
    """
    with torch.autocast(k.device.type, enabled=False):
        precise = torch.promote_types(k.dtype, torch.float32)
        batch, heads, length, _ = k.shape
        codebook = codebook.to(precise)
        half_norm = codebook.square().sum(-1).mul_(0.5).unsqueeze(1)  # (H 1 S)
        transposed = codebook.transpose(1, 2)  # (H D S)
        codes = torch.empty(batch, heads, length, dtype=torch.int64, device=k.device)
        rows = max(64, _BLOCK_SCORES // max(1, batch * heads * codebook.shape[1]))
        for start in range(0, length, rows):
            block = k[:, :, start : start + rows].to(precise)
            codes[:, :, start : start + rows] = (block @ transposed).sub_(half_norm).argmax(-1)
        lowest = _lowest_of_equals(codebook, half_norm.squeeze(1))
        return lowest.unsqueeze(0).expand(batch, -1, -1).gather(2, codes)


def _lowest_of_equals(codebook: Tensor, norms: Tensor) -> Tensor:
    """(H, S): for each codeword of a codebook (H, S, D) the lowest code of an equal codeword.

    ``norms`` (H, S) are equal for equal codewords.
    """
    order = norms.sort(dim=-1, stable=True).indices  # equal codewords stand side by side, the lowest first
    ordered = codebook.gather(1, order.unsqueeze(-1).expand_as(codebook))
    position = torch.arange(order.shape[1], device=order.device).expand_as(order)
    repeated = torch.nn.functional.pad((ordered[:, 1:] == ordered[:, :-1]).all(-1), (1, 0))
    first = position.masked_fill(repeated, 0).cummax(-1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, first))
