"""Decides for a rotary module whether codes represent keys with or without their positions."""

from dataclasses import replace

from torch import nn

from longvq_layers.replace.adapters.base import BOTH_SIDES
from longvq_layers.replace.plan import SwapPlan
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary

FAR_POSITIONS = ("auto", "rectified", "rotated")


def decide(model: nn.Module, plan: SwapPlan, *, far_positions: str, trained_length: int | None) -> SwapPlan | str:
    """The plan with the decision whether positions are removed.

    Returns:
        Why the site can't be replaced, if "rectified" is asked for but impossible.
    """
    if not plan.has_rotary:
        return plan
    plan = replace(plan, may_stay_rotated=far_positions == "auto")
    if far_positions == "rotated":
        return replace(plan, why_rotated="far_positions='rotated'")
    found = _rotary(model, plan)
    if isinstance(found, ClampedRotary):
        length = plan.site.trained_length if trained_length is None else trained_length
        return replace(plan, rotary=found, trained_length=length)
    if far_positions == "rectified":
        return f"far_positions='rectified' is impossible: {found}"
    return replace(plan, why_rotated=found)


def _rotary(model: nn.Module, plan: SwapPlan) -> ClampedRotary | str:
    if plan.causal != "yes":
        return BOTH_SIDES
    if plan.options.local_keys != "exact":
        return "it needs local_keys='exact'"
    return plan.site.adapter.clamped_rotary(model, plan.site, plan.options.window)
