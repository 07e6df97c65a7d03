"""K-means per head: how a codebook gets its first codes."""

import torch
from torch import Tensor

from longvq_layers import ops
from longvq_layers.layers.common.context import no_autocast

_START_KEYS_PER_CODE = 16  # the start draws from that many keys per code; it is sequential in the codes, so keys cost
_START_KEYS_AT_LEAST = 4096  # time, and Lloyd then sees them all


def kmeans(
    keys: Tensor,
    num_codes: int,
    *,
    iterations: int = 10,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fit one codebook per head to its keys: k-means++ start, then Lloyd iterations.

        z_n = argmin_s ‖keys_n − C_s‖²,   C_s = mean of the keys with z_n = s

    A code that loses all its keys moves to one of the keys farthest from their codes. With fewer distinct keys than
    codes the surplus codes are copies of keys; the result is always finite.

    Args:
        keys: (H, N, D) float; arithmetic is in float32, float64 stays float64.
        num_codes: S, codes per head, at least 1.
        iterations: Lloyd iterations after the start, default 10.
        mask: (H, N) or (N,) bool, True = ignore this key. Default: every key counts.
        generator: source of the random start; the same seed gives the same codes.

    Returns:
        (H, S, D) codebook, float32 or float64. Zeros for a head that has no key at all.

    Raises:
        ValueError: wrong rank, wrong mask shape, num_codes or iterations out of range.

    Example:
        >>> keys = torch.tensor([[[0.0], [0.1], [5.0], [5.1]]])
        >>> kmeans(keys, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values.flatten()
        tensor([0.0500, 5.0500])

    Source: Arthur and Vassilvitskii 2007, k-means++.
    """
    if keys.dim() != 3:
        raise ValueError(f"kmeans: keys must have shape (H, N, D), got {tuple(keys.shape)}")
    if num_codes < 1:
        raise ValueError(f"kmeans: num_codes must be at least 1, got {num_codes}")
    if iterations < 0:
        raise ValueError(f"kmeans: iterations must be 0 or more, got {iterations}")
    heads, count, _ = keys.shape
    if mask is not None and tuple(mask.shape) not in ((count,), (heads, count)):
        raise ValueError(f"kmeans: mask must have shape {(count,)} or {(heads, count)}, got {tuple(mask.shape)}")

    with torch.no_grad(), no_autocast(keys.device):
        keys = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
        valid = torch.ones(heads, count, dtype=torch.bool, device=keys.device)
        if mask is not None:
            valid = (~mask.bool()).expand(heads, count)
            keys = keys.masked_fill(~valid.unsqueeze(-1), 0)  # a masked key may hold anything, even NaN
        if count == 0:
            return keys.new_zeros(heads, num_codes, keys.shape[-1])
        start = _sample(keys, valid, max(_START_KEYS_AT_LEAST, _START_KEYS_PER_CODE * num_codes), generator)
        codebook = _plus_plus(*start, num_codes, generator)
        for _ in range(iterations):
            codebook = _lloyd(keys, valid, codebook)
        return codebook


def draw(weight: Tensor, at: Tensor) -> Tensor:
    """Indices (H, A): for each number of at (H, A) in [0, 1) the place in weight[h] (H, N) below which that share lies.

    With uniformly distributed numbers index n comes in proportion to weight[h, n] ≥ 0. Rows whose weights are all zero
    give index 0. Unlike torch.multinomial: any N, no exception for zero rows, no synchronisation with the device.
    """
    running = weight.double().cumsum(-1)  # (H, N); float32 would lose small weights among many keys
    index = torch.searchsorted(running, at * running[:, -1:], right=True)  # right: never lands on a zero weight
    return index.clamp_(max=weight.shape[-1] - 1)


def spread(heads: int, amount: int, step: Tensor) -> Tensor:
    """Numbers (H, A) in [0, 1), float64, other ones at each `step`, evenly distributed in every direction.

    An additive recurrence with irrational steps, not random numbers: those would come from torch's generator, where a
    forward that is run again for activation checkpointing doesn't draw them again, and everything drawn later, dropout
    for one, would differ from the first run.
    """
    head = torch.arange(heads, dtype=torch.float64, device=step.device).unsqueeze(-1)
    code = torch.arange(amount, dtype=torch.float64, device=step.device)
    # Square roots of 2, 3 and 5: linearly independent over the rationals.
    return (2**0.5 * code + 3**0.5 * step.double() + 5**0.5 * head) % 1


def code_sums(keys: Tensor, codes: Tensor, valid: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Per code: the sum of its valid keys (H, S, D) and their number (H, S). keys (H, N, D), codes/valid (H, N)."""
    heads, _, width = keys.shape
    weight = valid.to(keys.dtype)
    counts = keys.new_zeros(heads, num_codes).scatter_add_(1, codes, weight)
    index = codes.unsqueeze(-1).expand(-1, -1, width)
    sums = keys.new_zeros(heads, num_codes, width).scatter_add_(1, index, keys * weight.unsqueeze(-1))
    return sums, counts


def pick(table: Tensor, index: Tensor) -> Tensor:
    """Rows of table (H, S, D) at index (H, N) -> (H, N, D)."""
    return table.gather(1, index.unsqueeze(-1).expand(-1, -1, table.shape[-1]))


def _sample(keys: Tensor, valid: Tensor, amount: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    # At most `amount` keys per head, valid ones first, drawn without replacement: keys (H, N, D), valid (H, N).
    if keys.shape[1] <= amount:
        return keys, valid
    rank = torch.rand(valid.shape, device=valid.device, generator=generator).masked_fill(~valid, -1)
    kept = rank.topk(amount, dim=-1).indices
    return pick(keys, kept), valid.gather(1, kept)


def _plus_plus(keys: Tensor, valid: Tensor, num_codes: int, generator: torch.Generator | None) -> Tensor:
    # keys (H, N, D), valid (H, N) -> (H, S, D). Each next code is a key drawn in proportion to its squared distance.
    any_valid = valid.to(keys.dtype)
    mean = keys.sum(1) / any_valid.sum(1, keepdim=True).clamp(min=1)  # (H, D); keys are zero where not valid
    centred = keys - mean.unsqueeze(1)  # distances by |a|² + |b|² − 2ab lose less when the keys are near zero
    square = centred.square().sum(-1)  # (H, N)
    distance = torch.full_like(square, torch.inf)
    chosen = torch.empty(keys.shape[0], num_codes, dtype=torch.int64, device=keys.device)
    for code in range(num_codes):
        weight = distance.masked_fill(~valid, 0) if code else any_valid
        nothing_left = weight.sum(-1, keepdim=True) <= 0  # every key already is a code
        at = torch.rand(keys.shape[0], 1, dtype=torch.float64, device=keys.device, generator=generator)
        index = draw(torch.where(nothing_left, any_valid, weight), at)  # (H, 1)
        chosen[:, code] = index[:, 0]
        centre = pick(centred, index)  # (H, 1, D)
        own = square.gather(1, index)
        new = square + own - 2 * torch.bmm(centred, centre.transpose(1, 2)).squeeze(-1)
        distance = torch.minimum(distance, new.clamp(min=0))
    return pick(keys, chosen)


def _lloyd(keys: Tensor, valid: Tensor, codebook: Tensor) -> Tensor:
    # One iteration; keys (H, N, D), valid (H, N), codebook (H, S, D) -> (H, S, D).
    num_codes = codebook.shape[1]
    codes = ops.vq_assign(keys.unsqueeze(0), codebook).squeeze(0)  # (H, N)
    sums, counts = code_sums(keys, codes, valid, num_codes)
    moved = sums / counts.clamp(min=1).unsqueeze(-1)

    error = (keys - pick(codebook, codes)).square().sum(-1).masked_fill(~valid, 0)  # (H, N)
    far_error, far = error.topk(min(num_codes, keys.shape[1]), dim=-1)
    empty = counts == 0  # (H, S)
    turn = (empty.cumsum(-1) - 1).clamp(min=0, max=far.shape[1] - 1)  # the n-th empty code takes the n-th farthest key
    enough = (empty.cumsum(-1) <= far.shape[1]) & (far_error.gather(1, turn) > 0)
    reseeded = torch.where(enough.unsqueeze(-1), pick(keys, far.gather(1, turn)), codebook)
    return torch.where(empty.unsqueeze(-1), reseeded, moved)
