"""Masks of nn.MultiheadAttention: causal or not, and the padding, or an error for every other mask."""

import torch
from torch import Tensor

NAME = "VQMultiheadAttention"  # in errors


def read_attn_mask(attn_mask: Tensor, is_causal: bool, length: int) -> bool:
    """Whether attention is causal, from `attn_mask`. If the mask hides nothing, `is_causal` decides.

    A compiled graph can't read the values of a mask, so it trusts `is_causal`.

    Raises:
        ValueError: a mask of another size.
        NotImplementedError: a mask that hides something but isn't the causal mask.
    """
    if attn_mask.shape[-2:] != (length, length):
        raise ValueError(f"{NAME}: attn_mask must have shape ({length}, {length}), got {tuple(attn_mask.shape)}")
    if torch.compiler.is_compiling() and is_causal:
        return True
    blocked = _blocked("attn_mask", attn_mask)
    future = torch.ones(length, length, dtype=torch.bool, device=attn_mask.device).triu(1)
    if length > 1 and not blocked.any():
        return is_causal
    if not (blocked == future).all():
        raise NotImplementedError(
            f"{NAME}: attn_mask must be None or the causal mask, got a mask that is not exactly causal; other masks "
            "have no linear-time form"
        )
    return True


def read_padding(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The padding (B, L) bool, True = ignore, from a bool or float mask; one sequence may have no batch axis."""
    if mask is None:
        return None
    mask = _blocked("key_padding_mask", mask)
    if mask.dim() == 1:
        mask = mask.unsqueeze(0)
    if tuple(mask.shape) != (batch, length):
        raise ValueError(f"{NAME}: key_padding_mask must have shape {(batch, length)}, got {tuple(mask.shape)}")
    return mask


def _blocked(name: str, mask: Tensor) -> Tensor:
    """bool (True = not allowed) as it is; float must be 0 or -inf."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"{NAME}: {name} must be bool or float, got {mask.dtype}")
    if torch.compiler.is_compiling():
        return _blocked_when_run(mask.detach(), name)
    return _blocked_by_float(mask, name)


def _blocked_by_float(mask: Tensor, name: str) -> Tensor:
    blocked = mask == -torch.inf
    if not (blocked | (mask == 0)).all():
        raise NotImplementedError(
            f"{NAME}: {name} must hold 0 and -inf only, got other values; an additive bias has no linear-time form"
        )
    return blocked


# One opaque step of a compiled graph: it looks at the values when it runs and raises what eager raises. CUDA graphs
# can't hold it, because the host reads the answer.
_blocked_when_run = torch.library.custom_op(
    "longvq_layers::blocked_by_float", _blocked_by_float, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@_blocked_when_run.register_fake
def _(mask: Tensor, name: str) -> Tensor:
    return torch.empty_like(mask, dtype=torch.bool)
