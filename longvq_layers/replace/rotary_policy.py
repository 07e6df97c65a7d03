"""What codes of a rotary model stand for: keys with or without their positions."""

from torch import nn

from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary, clamped_rotary


def plan(
    model: nn.Module,
    sites: list[Site],
    window: int,
    local_keys: str,
    far_positions: str,
    trained_length: int | None,
) -> None:
    """Decide for every module whether positions are to be taken off; "rectified" where that can't be is a refusal."""
    for site in sites:
        if not site.has_rotary or site.refusal is not None:
            continue
        site.may_stay_rotated = far_positions == "auto"
        found = "far_positions='rotated'" if far_positions == "rotated" else _rotary(model, site, window, local_keys)
        if isinstance(found, ClampedRotary):
            site.rotary, site.trained_length = found, _trained_length(site, trained_length)
        elif far_positions == "rectified":
            site.refusal = f"far_positions='rectified' is impossible: {found}"
        else:
            site.why_rotated = found


def remark(sites: list[Site]) -> None:
    """Note in the report what was decided."""
    for site in sites:
        if site.rotary is not None:
            text = "rotary positions: outside the window the relative position is clamped to it (rectified)"
            if site.trained_length is not None:
                text += f", far keys count as in {site.trained_length:,} tokens at most"
            site.notes.append(text)
        elif site.why_rotated is not None:
            site.notes.append(f"rotary positions: keys are quantised as they arrive, rotated ({site.why_rotated})")


def _rotary(model: nn.Module, site: Site, window: int, local_keys: str) -> ClampedRotary | str:
    if site.causal != "yes":
        return "bidirectional attention has far keys on both sides"
    if local_keys != "exact":
        return "it needs local_keys='exact'"
    return clamped_rotary(model, site.name, site.module, window)


def _trained_length(site: Site, given: int | None) -> int | None:
    if given is not None:
        return given
    length = getattr(site.module.config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
