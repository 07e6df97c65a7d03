"""The checkpoint of a distillation. It is checked before anything runs, and only a run with equal settings uses it."""

import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.replace.distill.setup import NAME


def checked_path(checkpoint: object) -> Path | None:
    """The path, or None for None.

    Raises:
        TypeError, ValueError: no path, or a file that can't be written or read.
    """
    if checkpoint is None:
        return None
    check.path(NAME, "checkpoint", checkpoint)
    path = Path(str(checkpoint))
    if path.is_dir() or not path.parent.is_dir():
        why = "this is a folder" if path.is_dir() else f"{path.parent} is none"
        raise ValueError(f"{NAME}: checkpoint must be a file in a folder that exists, got {path}; {why}")
    if path.exists():
        read(path)
    return path


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        state = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{NAME}: checkpoint must be a file that {NAME} wrote, got {path}, which can't be read: {error}"
        ) from error
    if not isinstance(state, dict) or "first_errors" not in state:
        raise ValueError(
            f"{NAME}: checkpoint must be a file that {NAME} wrote, got {path}, which is not one; use another file"
        )
    return state


def write(path: Path, state: dict[str, Any]) -> None:
    """Write the file in one step: a half-written file never replaces a complete one."""
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def digest(values: object) -> str:
    """A hash of all numbers in nested tensors, and of the nesting."""
    return hashlib.sha256(b"".join(_bytes(values))).hexdigest()


def _bytes(values: object) -> Iterator[bytes]:
    if isinstance(values, Mapping):
        values = [item for name in sorted(values, key=str) for item in (str(name), values[name])]
    if isinstance(values, tuple | list):
        yield f"{len(values)}:".encode()
        for value in values:
            yield from _bytes(value)
    elif isinstance(values, Tensor):
        yield f"{values.dtype}{tuple(values.shape)}".encode()
        yield values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield str(values).encode()


def fingerprint(tensors: Iterable[Tensor]) -> list[float]:
    """Sum and norm of each tensor. They differ for other weights, and hardly depend on the number of threads."""
    numbers = []
    for x in tensors:
        x = (x.detach() if x.is_floating_point() else x.double()).nan_to_num()
        norm = torch.linalg.vector_norm(x, dtype=torch.float64)
        numbers += [x.sum(dtype=torch.float64).item(), norm.item()]
    return numbers


def same(saved: object, current: object) -> bool:
    """Whether two settings agree; fingerprints up to rounding, relative to the norm of each tensor."""
    if not (isinstance(current, list) and isinstance(saved, list)):
        return saved == current
    sizes = [max(abs(norm), 1e-30) for norm in current[1::2] for _ in range(2)]
    return len(saved) == len(current) and all(
        abs(a - b) <= 1e-3 * size for a, b, size in zip(saved, current, sizes, strict=True)
    )
