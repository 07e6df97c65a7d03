"""The interface of the module in the slot of an attention module, and the slot's name."""

import contextlib
from collections.abc import Callable

from torch import Tensor, nn

from longvq_layers.replace.slot.clamped_rotary import ClampedRotary
from longvq_layers.replace.slot.context import ForwardContext, StepAttention

SLOT = "longvq"  # name of the submodule; it is part of the names in state dicts

# The attention function of a transformers module: (module, query, key, value, mask, **options) -> (output, weights)
OriginalAttention = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionSlot(nn.Module):
    """Base of the modules at ``module._modules[SLOT]``, which compute the attention of `module`.

    Adapters call the slot with queries, keys and values. Beyond that they use only the attributes and methods below.

        forward(q, k, v, key_padding_mask=None, *, far=None, causal=False, scale=None) -> output

    with q (B, H, L, D), k (B, Hkv, L, D), v (B, Hkv, L, E), key_padding_mask (B, L) bool, True = ignore, and output
    (B, H, L, E). `far` holds the queries and keys of pairs outside the window, shaped like q and k; default q and k.

    Attributes:
        rotary: removes the positions of queries and keys; None if far pairs use queries and keys as they arrive.
        has_positions: False once a forward has shown that the keys do not depend on their positions.
        linear_masks: True if a transformers model makes masks of linear size for this slot.
        original: the transformers attention function that must still produce the output (calibration); else None.
        observe: with `original`, called as ``observe(q, k, v, output, far=, causal=, key_padding_mask=, scale=)`` with
            the output (B, H, L, E) of the original.
        contexts: the context of the running forward, per thread.
    """

    rotary: ClampedRotary | None  # no default here: a class attribute would hide the submodule
    has_positions: bool = False
    linear_masks: bool = True
    original: OriginalAttention | None = None
    observe: Callable[..., None]
    contexts: dict[int, ForwardContext]

    @property
    def sizes(self) -> tuple[int, int, int] | None:
        """(H, Hkv, D), or None if no call has shown them yet."""
        return None

    @property
    def step_attention(self) -> StepAttention | None:
        """The attention that continues from a state of constant size; None if the slot can't do this now."""
        return None

    def refusals(self) -> contextlib.AbstractContextManager[None]:
        """The context of a call: calibration adds the module's name to a NotImplementedError raised in it."""
        return contextlib.nullcontext()

    def keep_rotated(self, why: str) -> bool:
        """Keep the positions from now on because of `why`, if that is still allowed. Return whether it is."""
        return False

    def needs_adapter_check(self) -> bool:
        """Whether a custom adapter must compare its output with the module's own (first pass of calibration)."""
        return False

    def is_first_check(self, padded: bool) -> bool:
        """True for the first call with padding and for the first without; only these are compared."""
        return False


def slot_of(module: nn.Module) -> AttentionSlot:
    """The slot of a module whose attention is replaced."""
    slot = find_slot(module)
    if slot is None:
        raise RuntimeError(f"longvq attention: {type(module).__name__} has no attention slot")
    return slot


def find_slot(module: nn.Module) -> AttentionSlot | None:
    """The slot of a module, or None if its attention is not replaced."""
    slot = module._modules.get(SLOT)
    return slot if isinstance(slot, AttentionSlot) else None


def fill_slot(module: nn.Module, slot: AttentionSlot) -> None:
    """Put `slot` into the module's slot, in place of the one that is there."""
    setattr(module, SLOT, slot)


def remove_slot(module: nn.Module) -> None:
    """Remove what stands in the module's slot, if anything does."""
    module._modules.pop(SLOT, None)
