"""Divides the codes of a model among its layers. Layers with large errors get more; the total memory stays."""

import math

import torch
from torch import Tensor

from longvq_layers.layers.codebook.kmeans import kmeans

_KEYS = 4096  # per head, from which the exponent is measured
_STEPS = 8  # shares in num_codes; a layer gets a whole number of shares
_LEAST, _MOST = 2, 4 * _STEPS  # shares of a layer
_EXPONENTS = (0.05, 2.0)  # smallest and largest exponent; measurements outside are clamped


def error_exponent(keys: Tensor, num_codes: int, generator: torch.Generator) -> float:
    """The exponent b of a layer whose squared key error falls as S^-b, measured at num_codes / 2 and num_codes.

    Args:
        keys: (Hkv, N, D) in the metric of the queries.
        num_codes: S.
        generator: of the k-means.
    """
    keys = keys[:, torch.linspace(0, keys.shape[1] - 1, min(keys.shape[1], _KEYS)).long()]
    errors = []
    for codes in (max(num_codes // 2, 1), num_codes):
        table = kmeans(keys, codes, iterations=2, generator=generator)
        errors.append(torch.cdist(keys.to(table.dtype), table).amin(-1).square().sum().item())
    if not errors[0] > errors[1] > 0:
        return _EXPONENTS[0]
    return min(max(math.log2(errors[0] / errors[1]), _EXPONENTS[0]), _EXPONENTS[1])


def share_out(errors: list[float], exponents: list[float], heads: list[int], num_codes: int) -> list[int]:
    """Codes of each layer that make ``Σ_l errors_l (S_l / S)^-exponents_l`` small.

    One share at a time goes to the layer whose error falls most per key-value head.

    Args:
        errors: squared relative error of each layer's output with num_codes codes.
        exponents: from `error_exponent`.
        heads: key-value heads of each layer; each head has its own S_l codes.
        num_codes: S, the mean over heads. No layer gets less than a quarter of S or more than four times S.

    Returns:
        S_l, whose sum over all heads is at most S times the number of heads.

    Example:
        >>> share_out([0.2, 0.1, 0.1], [0.5, 0.5, 0.5], [4, 4, 4], 64)
        [80, 56, 56]
    """
    shares = [_LEAST] * len(errors)
    left = sum((_STEPS - _LEAST) * h for h in heads)

    def error(layer: int, share: int) -> float:
        value: float = errors[layer] * (share / _STEPS) ** -exponents[layer]
        return value

    while True:
        gains = {
            layer: (error(layer, share) - error(layer, share + 1)) / heads[layer]
            for layer, share in enumerate(shares)
            if share < _MOST and heads[layer] <= left
        }
        if not gains:
            return [max(1, share * num_codes // _STEPS) for share in shares]
        best = max(gains, key=gains.__getitem__)
        shares[best] += 1
        left -= heads[best]
