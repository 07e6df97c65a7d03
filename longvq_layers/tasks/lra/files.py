"""Find the files of the Long Range Arena that a user has downloaded."""

import csv
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from longvq_layers import _checks as check


def folder_with(task: str, data_dir: str | PathLike[str], expected: str, *inside: str) -> Path:
    """`data_dir`, or the first of the folders `inside` it, that has the file or folder `expected`.

    Raises:
        FileNotFoundError: none has it; names the expected path.
    """
    check.path(task, "data_dir", data_dir)
    root = Path(data_dir).expanduser()
    for folder in (root, *(root / name for name in inside)):
        if (folder / expected).exists():
            return folder
    also = f" (or in {', '.join(f'{name}/' for name in inside)} there)" if inside else ""
    raise FileNotFoundError(
        f"{task}: data_dir must be the folder of the downloaded data, got no {root / expected}{also}"
    )


def existing(task: str, path: Path) -> Path:
    """The path, or a FileNotFoundError that names it."""
    if not path.exists():
        raise FileNotFoundError(f"{task}: data_dir must be the folder of the downloaded data, got no {path}")
    return path


def tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields of a file with tabs and the quotes of Python's csv module."""
    with path.open(newline="", encoding="utf-8") as file:
        yield from enumerate(csv.reader(file, delimiter="\t"), start=1)


def shuffled(names: list[str]) -> list[str]:
    """The names in an order that depends only on each name."""
    return sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))
