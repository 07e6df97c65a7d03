"""What codes are fitted to: the metric of the queries, and keys in proportion to a weight."""

import torch
from torch import Tensor

from longvq_layers.layers.codebook.operations import draw


def in_proportion(weight: Tensor) -> Tensor:
    """N indices (H, N) in which index n occurs in proportion to weight[h, n], up to rounding; weight is (H, N)."""
    count = weight.shape[1]
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, 1)
    at = (torch.arange(count, dtype=torch.float64, device=weight.device) + 0.5) / max(count, 1)
    return draw(weight, at.expand(weight.shape[0], -1))


def roots(second_moment: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """M^½ and M^-½ of second_moment (H, D, D), scaled to mean eigenvalue 1.

    Eigenvalues are at least `ridge`, so that keys also differ in directions in which no query points.
    """
    moment = second_moment.double()
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    moment = torch.where(size > 0, moment / size.clamp(min=torch.finfo(moment.dtype).tiny), identity)
    values, vectors = torch.linalg.eigh((1 - ridge) * moment + ridge * identity)
    root = values.clamp(min=ridge).sqrt().unsqueeze(-2)  # (H, 1, D), one per column of vectors
    return (vectors * root) @ vectors.transpose(-1, -2), (vectors / root) @ vectors.transpose(-1, -2)
