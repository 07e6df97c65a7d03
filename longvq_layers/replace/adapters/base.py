"""The interface of adapters: what one finds, what it installs, and what it must be able to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from longvq_layers.replace.slot.attention_slot import AttentionSlot, OriginalAttention
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary

DROPOUT_NOTE = "attention dropout is not applied to the probabilities in training"
CROSS_ATTENTION = "cross-attention: the keys come from another sequence"
BOTH_SIDES = "bidirectional attention has far keys on both sides"  # so their positions can't be clamped


@dataclass(frozen=True, eq=False)
class Site:
    """An attention module as it was found in a model.

    Attributes:
        name: its name in the model, "" for the model itself.
        module: the module.
        adapter: the adapter that knows this kind of module.
        kind: what the report calls it now.
        new_kind: what the report calls it once it is replaced.
        causal: "yes", "no" or "per call".
        sizes: (H, Hkv, D), or None if only a forward shows them.
        refusal: why it can't be replaced, or None.
        has_rotary: whether its keys arrive rotated by their position.
        trained_length: the longest sequence of its training as its config says, in tokens; None if unknown.
        notes: what a user should know once it is replaced.
    """

    name: str
    module: nn.Module
    adapter: "Adapter"
    kind: str
    new_kind: str
    causal: str
    sizes: tuple[int, int, int] | None
    refusal: str | None = None
    has_rotary: bool = False
    trained_length: int | None = None
    notes: tuple[str, ...] = ()


class Record(Protocol):
    """What one adapter changes in a model. All changes are listed before the first is made, so that any can be undone.

    It refers to modules by object, so that a deep copy of the model gets a separate record of the copied modules.
    """

    @property
    def attached(self) -> tuple[nn.Module, ...]:
        """The attention modules that get a slot."""

    def undo(self) -> None:
        """Undo all changes that were made, even if `install` has made only some of them."""


class Installable(Record, Protocol):
    """A record that was not installed yet."""

    def install(self, slots: Sequence[AttentionSlot]) -> None:
        """Make the changes: one slot per attached module."""


class Adapter(Protocol):
    """How one kind of attention module is found, swapped and put back."""

    model_makes_masks: bool  # True if the model makes the masks, once for all of its attention modules

    def find(self, model: nn.Module) -> list[Site]:
        """Every attention module of this kind."""

    def is_replaced(self, module: nn.Module) -> bool:
        """Whether the module is of this kind and its attention is replaced."""

    def original_attention(self, module: nn.Module) -> OriginalAttention | None:
        """The attention function that calibration must call; None: queries, keys and values are enough."""

    def clamped_rotary(self, model: nn.Module, site: Site, window: int) -> ClampedRotary | str:
        """The module that removes the positions of the site's queries and keys, or why they can't be removed."""

    def plan_record(self, model: nn.Module, sites: Sequence[Site], *, linear_masks: bool) -> Installable:
        """The record of a replacement of these sites; changes nothing.

        Args:
            linear_masks: let the model make masks of linear size, where it makes masks.
        """


def own_forward(module: nn.Module) -> str | None:
    """Why a module is refused if its forward was set on the object itself: this forward would bypass the swap."""
    if "forward" not in module.__dict__:
        return None
    return "its forward was replaced on the module itself (by a hook of accelerate, say); replace the attention first"
