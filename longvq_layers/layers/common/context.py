"""What surrounds a layer's call: autocast, and backward recomputing a forward."""

import torch


def no_autocast(device: torch.device) -> torch.autocast:
    """The context in which autocast lowers nothing: distances and statistics need float32."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    return torch.autocast(kind, enabled=False)


def recomputing() -> bool:
    """Whether activation checkpointing runs this forward again inside backward: nothing may be learned twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
