"""The plan of a replacement: what is decided for one attention module."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary
from longvq_layers.replace.slot.settings import SlotOptions


@dataclass(frozen=True, eq=False)
class SwapPlan:
    """What is decided for one site. A plan never changes: a later finding makes a new plan.

    Attributes:
        site: the module, as it was found.
        options: the options of its slot.
        causal: "yes", "no" or "per call".
        has_rotary: whether its keys arrive rotated by their position.
        rotary: removes the positions of its queries and keys; None if the positions stay.
        trained_length: with `rotary`, the longest sequence of its training.
        may_stay_rotated: whether the positions may stay if calibration shows that they can't be removed.
        why_rotated: why the positions stay, or None.
        served_by: the backend of its slot; None before `select.with_backends`.
        notes: what the report says about it.
    """

    site: Site
    options: SlotOptions
    causal: str
    has_rotary: bool
    rotary: ClampedRotary | None = None
    trained_length: int | None = None
    may_stay_rotated: bool = True
    why_rotated: str | None = None
    served_by: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, site: Site, options: SlotOptions) -> "SwapPlan":
        """The plan of a site before the decision about its positions."""
        return cls(site, options, site.causal, site.has_rotary, notes=site.notes)

    def with_notes(self, *notes: str) -> "SwapPlan":
        """The plan with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def with_num_codes(self, num_codes: int) -> "SwapPlan":
        """The plan with another number of codes."""
        return replace(self, options=replace(self.options, num_codes=num_codes))

    @property
    def far_positions(self) -> str | None:
        """How far pairs are treated: "rectified" or "rotated"; None without rotary positions."""
        if not self.has_rotary:
            return None
        return "rotated" if self.rotary is None else "rectified"

    @property
    def rotary_notes(self) -> tuple[str, ...]:
        """What the report says about rotary positions."""
        if self.rotary is not None:
            text = "rotary positions: outside the window the relative position is clamped to it (rectified)"
            if self.trained_length is not None:
                text += f", far keys count as in {self.trained_length:,} tokens at most"
            return (text,)
        if self.why_rotated is not None:
            return (f"rotary positions: keys are quantised as they arrive, rotated ({self.why_rotated})",)
        return ()


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the module's first parameter; torch's defaults for a module without parameters."""
    parameter = next(module.parameters(), torch.empty(0))
    return parameter.device, parameter.dtype
