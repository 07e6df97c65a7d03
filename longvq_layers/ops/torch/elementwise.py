"""Functions of single scores."""

import math

import torch
from torch import Tensor

_MU, _SIGMA = math.sqrt(0.5), math.sqrt(0.25 / math.pi)


def laplace(x: Tensor) -> Tensor:
    """Mega's attention function ``½(1 + erf((x − μ) / (σ√2)))`` (Ma et al. 2022, eq. 16)."""
    return torch.erf((x - _MU) / (_SIGMA * math.sqrt(2))).add_(1).mul_(0.5)


def laplace_grad(x: Tensor) -> Tensor:
    """The derivative of :func:`laplace`: the density of a normal distribution with mean μ and deviation σ."""
    return torch.exp(((x - _MU) / _SIGMA).square_().mul_(-0.5)).div_(_SIGMA * math.sqrt(2 * math.pi))
