"""One attention module that may be replaced, and what is known about it before anything is touched."""

import types
from dataclasses import dataclass, field

from torch import nn

from longvq_layers.replace.slot.clamped_rotary import ClampedRotary


@dataclass(eq=False)
class Site:
    """An attention module of a model: where it is, what it is, and why it would be refused."""

    name: str  # its name in the model
    module: nn.Module
    adapter: types.ModuleType  # huggingface or torch_nn
    kind: str  # what it is now
    new_kind: str  # what it becomes
    causal: str  # "yes", "no" or "per call"
    sizes: tuple[int, int, int] | None  # H, Hkv, D; None: only a forward pass tells
    backend: str | None = None  # which one serves it, once that is known
    refusal: str | None = None  # why it can't be replaced
    num_codes: int | None = None  # of its own, once calibration has shared them out
    has_rotary: bool = False  # whether its keys arrive rotated by their position
    rotary: ClampedRotary | None = None  # how that is taken off keys; None: it stays
    trained_length: int | None = None  # with `rotary`: the longest sequence of its training
    may_stay_rotated: bool = True  # whether it may stay where it can't be taken off
    why_rotated: str | None = None  # why it stays
    notes: list[str] = field(default_factory=list)


def own_forward(module: nn.Module) -> str | None:
    """Why a module can't be replaced whose forward was set on the object itself: it would go on being called."""
    if "forward" not in module.__dict__:
        return None
    return "its forward was replaced on the module itself (by a hook of accelerate, say); replace the attention first"
