"""The context of a forward: autocast, and activation checkpointing."""

import torch


def no_autocast(device: torch.device) -> torch.autocast:
    """A context with autocast off: distances and statistics need float32."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    return torch.autocast(kind, enabled=False)


def recomputing() -> bool:
    """Whether activation checkpointing runs this forward again inside backward. Don't update statistics twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
