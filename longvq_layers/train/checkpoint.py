"""The checkpoint of a run: a killed run continues from it to the same curve."""

import os
from pathlib import Path

import torch
from torch import nn


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, float]) -> None:
    """Write model, optimiser, random state and `progress` (step, seconds); an interrupted call keeps the old file."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "progress": progress,
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Restore model, optimiser and random state; returns `progress`."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    progress: dict[str, float] = state["progress"]
    return progress
