"""The commitment loss of a whole model."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.codebook_attention import CodebookAttention


def commitment_loss(model: nn.Module) -> Tensor:
    """Sum of the commitment losses β‖k − sg(k̂)‖² of all VQ layers in `model`, from their last training forward.

    Add it to the task's loss before `backward()`. A shared layer counts once.

    Args:
        model: any module, with or without VQ layers.

    Returns:
        Scalar tensor, float32 (float64 for double codebooks), on the device of the model; 0 without VQ layers, in
        eval mode, or before the first forward.

    Raises:
        TypeError: `model` isn't a module.

    Example:
        >>> import longvq_layers
        >>> layer = longvq_layers.VQAttention(32, 2, num_codes=16)
        >>> out = layer(torch.randn(2, 40, 32))
        >>> (out.square().mean() + commitment_loss(layer)).backward()

    Source: van den Oord et al. 2017, eq. 3, third term.
    """
    check.module("commitment_loss", "model", model)
    losses = [
        module.last_commitment
        for module in model.modules()
        if isinstance(module, CodebookAttention) and module.training and module.last_commitment is not None
    ]
    if losses:
        return torch.stack([loss.to(losses[0]) for loss in losses]).sum()
    anchor = next(model.parameters(), next(model.buffers(), None))  # any tensor tells the device
    return torch.zeros((), device=None if anchor is None else anchor.device)
