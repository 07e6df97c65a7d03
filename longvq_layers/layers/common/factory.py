"""Where new parameters are made: the two keyword arguments that every layer takes."""

from typing import TypedDict

import torch


class Factory(TypedDict):
    """Keyword arguments of PyTorch's functions and modules that make tensors."""

    device: torch.device | str | None
    dtype: torch.dtype | None
