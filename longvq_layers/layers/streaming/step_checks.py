"""Checks of streaming calls (`initial_state`, `step`)."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check


def batch(name: str, value: object) -> None:
    """`value` is a number of sequences."""
    # Not isinstance(value, int): sizes are also NumPy's integers and, under a tracer, symbols and tensors.
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name}: batch must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: batch must be 0 or more, got {value}")


def mask_of_token(name: str, mask: object) -> Tensor | None:
    """The mask (B, 1) of one token from (B,)."""
    if mask is None:
        return None
    check.tensor(name, "key_padding_mask", mask, "B")
    return mask.unsqueeze(1)


def causal(name: str, value: bool) -> None:
    if not value:
        raise NotImplementedError(
            f"{name}: a bidirectional {_kind(name)} (causal=False) depends on the future, got one position after the "
            "other; make it with causal=True"
        )


def eval_mode(name: str, module: nn.Module) -> None:
    if module.training:
        raise RuntimeError(
            f"{name}: the {_kind(name)} is in training mode, where dropout, batch norm and codebooks make steps differ "
            "from what `forward` gives later; call eval() first"
        )


def inference(name: str, module: nn.Module, x: Tensor) -> None:
    """The module is in eval mode, and nobody asks for gradients through a state that is updated in place."""
    eval_mode(name, module)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        raise NotImplementedError(
            f"{name}: there are no gradients through a state that is updated in place; call it under torch.no_grad() "
            "or torch.inference_mode(), or use forward"
        )


def state_type(name: str, state: object, kind: type) -> None:
    if not isinstance(state, kind):
        raise TypeError(f"{name}: state must be a {kind.__name__}, from initial_state, got {type(state).__name__}")


def rows(name: str, x: Tensor, state: Tensor) -> None:
    """`x` (B, T, ...) has as many rows as the `state` (B, ...)."""
    if x.shape[0] != state.shape[0]:
        raise ValueError(f"{name}: x must have the B = {state.shape[0]} of the state, got {x.shape[0]}")


def _kind(name: str) -> str:
    return "block" if "Block." in name else "layer"
