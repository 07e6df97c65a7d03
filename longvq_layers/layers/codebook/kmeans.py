"""K-means per head, which gives a codebook its first codes."""

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers import ops
from longvq_layers.layers.codebook.operations import code_sums, draw, pick
from longvq_layers.layers.common.context import no_autocast

# k-means++ is sequential in the codes, so it sees a sample of the keys only. Lloyd's iterations see all keys.
_START_KEYS_PER_CODE = 16
_START_KEYS_AT_LEAST = 4096


def kmeans(
    keys: Tensor,
    num_codes: int,
    *,
    iterations: int = 10,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fit one codebook per head to its keys: a start by k-means++, then Lloyd's iterations.

        z_n = argmin_s ‖keys_n − C_s‖²,   C_s = mean of the keys with z_n = s

    A code that loses all its keys moves to one of the keys farthest from their codes. If there are more codes than
    distinct keys, the surplus codes are copies of keys. The result is always finite.

    Args:
        keys: (H, N, D) float. Arithmetic is float64 for float64 keys, else float32.
        num_codes: S, codes per head, at least 1.
        iterations: Lloyd's iterations after the start, default 10.
        mask: (H, N) or (N,) bool, True = ignore this key. Default: every key counts.
        generator: random numbers of the start; the same seed gives the same codes. Default torch's generator.

    Returns:
        (H, S, D) codebook, float32 or float64; zeros for a head without any key.

    Raises:
        ValueError, TypeError: a wrong shape, or num_codes or iterations out of range.

    Example:
        >>> keys = torch.tensor([[[0.0], [0.1], [5.0], [5.1]]])
        >>> kmeans(keys, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values.flatten()
        tensor([0.0500, 5.0500])

    Source: Arthur and Vassilvitskii 2007, k-means++.
    """
    check.tensor("kmeans", "keys", keys, "H N D")
    check.positive("kmeans", num_codes=num_codes)
    check.integer("kmeans", "iterations", iterations, 0)
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
        amount = max(_START_KEYS_AT_LEAST, _START_KEYS_PER_CODE * num_codes)
        sample, sample_valid = _sample(keys, valid, amount, generator)
        codebook = _plus_plus(sample, sample_valid, num_codes, generator)
        for _ in range(iterations):
            codebook = _lloyd(keys, valid, codebook)
        return codebook


def _sample(keys: Tensor, valid: Tensor, amount: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """At most `amount` keys per head, drawn without replacement, valid ones first: keys (H, N, D), valid (H, N)."""
    if keys.shape[1] <= amount:
        return keys, valid
    rank = torch.rand(valid.shape, device=valid.device, generator=generator).masked_fill(~valid, -1)
    kept = rank.topk(amount, dim=-1).indices
    return pick(keys, kept), valid.gather(1, kept)


def _plus_plus(keys: Tensor, valid: Tensor, num_codes: int, generator: torch.Generator | None) -> Tensor:
    """The start (H, S, D) from keys (H, N, D), valid (H, N).

    Each code is a key, drawn in proportion to its squared distance from the codes so far.
    """
    any_valid = valid.to(keys.dtype)
    mean = keys.sum(1) / any_valid.sum(1, keepdim=True).clamp(min=1)  # (H, D); keys are zero where not valid
    centred = keys - mean.unsqueeze(1)  # |a|² + |b|² − 2ab loses less precision for keys near zero
    square = centred.square().sum(-1)  # (H, N)
    distance = torch.full_like(square, torch.inf)
    chosen = torch.empty(keys.shape[0], num_codes, dtype=torch.int64, device=keys.device)
    for code in range(num_codes):
        weight = distance.masked_fill(~valid, 0) if code else any_valid
        nothing_left = weight.sum(-1, keepdim=True) <= 0  # every key is a code already
        at = torch.rand(keys.shape[0], 1, dtype=torch.float64, device=keys.device, generator=generator)
        index = draw(torch.where(nothing_left, any_valid, weight), at)  # (H, 1)
        chosen[:, code] = index[:, 0]
        centre = pick(centred, index)  # (H, 1, D)
        own = square.gather(1, index)
        new = square + own - 2 * torch.bmm(centred, centre.transpose(1, 2)).squeeze(-1)
        distance = torch.minimum(distance, new.clamp(min=0))
    return pick(keys, chosen)


def _lloyd(keys: Tensor, valid: Tensor, codebook: Tensor) -> Tensor:
    """The codebook (H, S, D) after one iteration over keys (H, N, D), valid (H, N)."""
    num_codes = codebook.shape[1]
    codes = ops.vq_assign(keys.unsqueeze(0), codebook).squeeze(0)  # (H, N)
    sums, counts = code_sums(keys, codes, valid, num_codes)
    moved = sums / counts.clamp(min=1).unsqueeze(-1)

    error = (keys - pick(codebook, codes)).square().sum(-1).masked_fill(~valid, 0)  # (H, N)
    far_error, far = error.topk(min(num_codes, keys.shape[1]), dim=-1)
    empty = counts == 0  # (H, S)
    # The n-th empty code moves to the n-th farthest key.
    turn = (empty.cumsum(-1) - 1).clamp(min=0, max=far.shape[1] - 1)
    enough = (empty.cumsum(-1) <= far.shape[1]) & (far_error.gather(1, turn) > 0)
    reseeded = torch.where(enough.unsqueeze(-1), pick(keys, far.gather(1, turn)), codebook)
    return torch.where(empty.unsqueeze(-1), reseeded, moved)
