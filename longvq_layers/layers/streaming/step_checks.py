"""Checks of streaming calls (`initial_state`, `step`)."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check


def batch(name: str, value: object) -> None:
    """`value` is a number of sequences."""
    # Not isinstance(value, int): a size may be an integer of NumPy and, in a traced program, a symbol or a tensor.
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name}: batch must be an int, got {type(value).__name__}")
    if value < 0:  # type: ignore[operator]  # what has __index__ can be compared
        raise ValueError(f"{name}: batch must be 0 or more, got {value}")


def mask_of_token(name: str, mask: Tensor | None) -> Tensor | None:
    """The mask (B, 1) of one token per row, from (B,)."""
    if mask is None:
        return None
    check.tensor(name, "key_padding_mask", mask, "B")
    return mask.unsqueeze(1)


def causal(name: str, value: bool) -> None:
    """The layer is causal; `name` is the operation."""
    if not value:
        raise NotImplementedError(
            f"{name}: causal must be True to run with a state, got False; outputs of a bidirectional {_kind(name)} "
            "depend on the future; make it with causal=True"
        )


def eval_mode(name: str, module: nn.Module) -> None:
    """The module is in eval mode."""
    if module.training:
        raise RuntimeError(
            f"{name}: the {_kind(name)} must be in eval mode, got training mode, where dropout, batch norm and "
            "codebooks make steps differ from what `forward` gives later; call eval() first"
        )


def inference(name: str, module: nn.Module, x: Tensor) -> None:
    """The module is in eval mode, and no gradient is asked for."""
    eval_mode(name, module)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        raise NotImplementedError(
            f"{name}: a state that is updated in place has no gradients; call it under torch.no_grad() or "
            "torch.inference_mode(), or use forward"
        )


def state_type(name: str, state: object, kind: type) -> None:
    """`state` is of the class that `initial_state` gives."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{name}: state must be of type {kind.__name__}, from initial_state, got {type(state).__name__}"
        )


def rows(name: str, x: Tensor, state: Tensor) -> None:
    """`x` (B, T, ...) has as many rows as `state` (B, ...)."""
    if x.shape[0] != state.shape[0]:
        raise ValueError(f"{name}: x must have the B = {state.shape[0]} of the state, got {x.shape[0]}")


def _kind(name: str) -> str:
    return "block" if "Block." in name else "layer"
