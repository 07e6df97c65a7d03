"""Operations on keys and codes: sums per code, rows of a table, and random draws that need no generator."""

import torch
from torch import Tensor


def code_sums(keys: Tensor, codes: Tensor, valid: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """For each code the sum (H, S, D) and number (H, S) of its valid keys; keys (H, N, D), codes and valid (H, N)."""
    heads, _, head_dim = keys.shape
    weight = valid.to(keys.dtype)
    counts = keys.new_zeros(heads, num_codes).scatter_add_(1, codes, weight)
    index = codes.unsqueeze(-1).expand(-1, -1, head_dim)
    sums = keys.new_zeros(heads, num_codes, head_dim).scatter_add_(1, index, keys * weight.unsqueeze(-1))
    return sums, counts


def pick(table: Tensor, index: Tensor) -> Tensor:
    """Rows of table (H, S, D) at index (H, N) -> (H, N, D)."""
    return table.gather(1, index.unsqueeze(-1).expand(-1, -1, table.shape[-1]))


def draw(weight: Tensor, at: Tensor) -> Tensor:
    """Draw indices in proportion to weights, by inverting their cumulative sum.

    A number u in [0, 1) gives the first index whose cumulative share of the weights exceeds u. If u is uniformly
    distributed, index n has probability weight[h, n] / Σ weight[h]. A row whose weights are all 0 gives index 0. Unlike
    torch.multinomial, it takes any N and rows of zeros, and doesn't synchronise with the device.

    Args:
        weight: (H, N), ≥ 0.
        at: (H, A) in [0, 1).

    Returns:
        (H, A) int64 in [0, N).
    """
    running = weight.double().cumsum(-1)  # (H, N); float32 would lose small weights among many keys
    index = torch.searchsorted(running, at * running[:, -1:], right=True)  # right: never an index of weight 0
    return index.clamp_(max=weight.shape[-1] - 1)


def spread(heads: int, amount: int, step: Tensor) -> Tensor:
    """Numbers (H, A) in [0, 1), float64, that differ from `step` to `step` and are evenly spread along every axis.

    They are an additive recurrence with irrational increments. Random numbers can't be used here. Activation
    checkpointing runs a forward twice, but updates codes in the first run only. The second run would skip the draw from
    torch's generator, and everything drawn later, such as dropout, would differ between the runs.
    """
    head = torch.arange(heads, dtype=torch.float64, device=step.device).unsqueeze(-1)
    code = torch.arange(amount, dtype=torch.float64, device=step.device)
    # The square roots of 2, 3 and 5 are linearly independent over the rationals.
    return (2**0.5 * code + 3**0.5 * step.double() + 5**0.5 * head) % 1
