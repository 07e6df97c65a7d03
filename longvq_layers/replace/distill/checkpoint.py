"""The file of an unfinished distillation: checked before anything runs, and used by the run it is of alone."""

import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from longvq_layers.replace.distill.setup import NAME


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


def digest(values: object) -> str:
    """Of all numbers in tensors, and of how they are nested."""
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
    """Sum and norm of each: other weights have others, the same on another number of threads almost the same."""
    numbers = []
    for x in tensors:
        x = (x.detach() if x.is_floating_point() else x.double()).nan_to_num()
        norm = torch.linalg.vector_norm(x, dtype=torch.float64)
        numbers += [x.sum(dtype=torch.float64).item(), norm.item()]
    return numbers


def same(theirs: object, mine: object) -> bool:
    """Whether two settings agree; fingerprints up to rounding, a sum measured by its tensor's norm."""
    if not (isinstance(mine, list) and isinstance(theirs, list)):
        return theirs == mine
    sizes = [max(abs(norm), 1e-30) for norm in mine[1::2] for _ in range(2)]
    return len(theirs) == len(mine) and all(
        abs(a - b) <= 1e-3 * size for a, b, size in zip(theirs, mine, sizes, strict=True)
    )
