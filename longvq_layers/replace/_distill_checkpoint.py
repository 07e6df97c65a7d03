"""The file of an unfinished distillation. Its path is checked before anything is run."""

import os
import pickle
from pathlib import Path

import torch

from longvq_layers.replace._distill_setup import NAME


def checked_path(checkpoint: object) -> Path | None:
    """The path, or None for none. Raises TypeError and ValueError where it couldn't be written or read."""
    if checkpoint is None:
        return None
    if not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"{NAME}: checkpoint: got {type(checkpoint).__name__}, expected a path or None")
    path = Path(checkpoint)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"{NAME}: checkpoint: got {path}, expected a file in a folder that exists; "
            + ("this is a folder" if path.is_dir() else f"{path.parent} is none")
        )
    if path.exists():
        read(path)
    return path


def read(path: Path) -> dict:
    """What `write` wrote. Raises ValueError if this is something else."""
    try:
        state = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{NAME}: checkpoint: {path} can't be read: {error}") from error
    if not isinstance(state, dict) or "first_errors" not in state:
        raise ValueError(f"{NAME}: checkpoint: {path} is not one that {NAME} wrote; use another file")
    return state


def write(path: Path, state: dict) -> None:
    """Write it; a half-written file never replaces one."""
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)
