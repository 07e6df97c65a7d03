"""Checks the entries of a `Codebook` in a state dict: completes a bare table of codes, and refuses damaged entries."""

import torch
from torch import Tensor

_LEARNED = ("ema_sum", "ema_count", "ema_error", "ema_energy", "idle", "steps", "initialized")


def complete_entries(state_dict: dict[str, Tensor], prefix: str, version: int | None) -> None:
    """Give a bare table of codes, without `Codebook._version`, the other entries of an initialised codebook."""
    table = state_dict.get(prefix + "embedding")
    if version is not None or table is None or any(prefix + name in state_dict for name in _LEARNED):
        return
    heads, codes = table.shape[:2]
    state_dict[prefix + "ema_sum"] = table.clone()
    state_dict[prefix + "ema_count"] = table.new_ones(heads, codes)
    state_dict[prefix + "ema_error"] = table.new_zeros(heads)
    state_dict[prefix + "ema_energy"] = table.new_zeros(heads)
    state_dict[prefix + "idle"] = torch.zeros(heads, codes, dtype=torch.int64, device=table.device)
    state_dict[prefix + "steps"] = torch.zeros((), dtype=torch.int64, device=table.device)
    state_dict[prefix + "initialized"] = torch.ones((), dtype=torch.bool, device=table.device)


def refuse_damaged(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Raise ValueError if codes or their averages are not finite."""
    for name in ("embedding", "ema_sum", "ema_count"):
        value = state_dict.get(prefix + name)
        if value is not None and value.device.type != "meta" and not bool(value.isfinite().all()):
            raise ValueError(
                f"Codebook.load_state_dict: {prefix}{name} must be finite, got NaN or infinity; the checkpoint is "
                "damaged or its training had diverged"
            )
