"""Decides for a rotary module whether codes represent keys with or without their positions."""

from dataclasses import dataclass

from torch import nn

from longvq_layers.replace.adapters.base import BOTH_SIDES, Site
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary

FAR_POSITIONS = ("auto", "rectified", "rotated")


@dataclass(frozen=True, eq=False)
class RotaryDecision:
    """What is decided for one site; the attributes are those of `SwapPlan`, and `refusal`.

    Attributes:
        refusal: why the site can't be replaced with these options, or None.
    """

    rotary: ClampedRotary | None = None
    trained_length: int | None = None
    may_stay_rotated: bool = True
    why_rotated: str | None = None
    refusal: str | None = None


def decide(
    model: nn.Module, site: Site, *, window: int, local_keys: str, far_positions: str, trained_length: int | None
) -> RotaryDecision:
    """Decide whether positions are removed. The site is refused if "rectified" is asked for but impossible."""
    if not site.has_rotary:
        return RotaryDecision()
    may_stay = far_positions == "auto"
    if far_positions == "rotated":
        return RotaryDecision(may_stay_rotated=may_stay, why_rotated="far_positions='rotated'")
    found = _rotary(model, site, window, local_keys)
    if isinstance(found, ClampedRotary):
        length = site.trained_length if trained_length is None else trained_length
        return RotaryDecision(found, length, may_stay)
    if far_positions == "rectified":
        return RotaryDecision(refusal=f"far_positions='rectified' is impossible: {found}")
    return RotaryDecision(may_stay_rotated=may_stay, why_rotated=found)


def _rotary(model: nn.Module, site: Site, window: int, local_keys: str) -> ClampedRotary | str:
    if site.causal != "yes":
        return BOTH_SIDES
    if local_keys != "exact":
        return "it needs local_keys='exact'"
    return site.adapter.clamped_rotary(model, site, window)
