"""Text without a download: the source of the running interpreter's standard library."""

import functools
import os
import random
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

from longvq_layers.tasks.base import SPLITS

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
_END_OF_FILE = b"\0"  # in no source file


def library_files() -> list[tuple[Path, str]]:
    """Source files of the standard library and their module names, without tests, in a fixed shuffled order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        # In place, so that os.walk does not enter the skipped folders.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            module = ".".join(path.relative_to(root).parts).removesuffix(".py").removesuffix(".__init__")
            files.append((path, module))
    files.sort(key=lambda file: file[1])
    random.Random(0).shuffle(files)
    return files


def top_level(name: str) -> str:
    """The module or package that the module `name` belongs to."""
    return name.partition(".")[0]


def bucket(name: str, buckets: int) -> int:
    """A number below `buckets` that depends only on the name."""
    return zlib.crc32(name.encode()) % buckets  # hash() of a string changes from process to process


@functools.cache
def split_bytes(split: str) -> Tensor:
    """All source of a split as one uint8 tensor; the name of a file decides its split (80, 10 and 10 %).

    Every file ends with a zero byte. Files with the same content are read once.
    """
    return _joined([text for name, text in _texts() if _split_of(name) == split])


@functools.cache
def package_bytes(packages: int) -> dict[str, dict[str, Tensor]]:
    """{package: {split: uint8 tensor}} of the packages with the most source; a file belongs to one split.

    In an order that depends only on the names, the files of a package go to val until that has a fifth of the bytes,
    then to test until that has a fifth; the others go to train. Packages with fewer than five files are left out.

    Raises:
        ValueError: the library has fewer such packages.
    """
    files: dict[str, list[tuple[int, bytes]]] = {}
    for name, text in _texts():
        files.setdefault(top_level(name), []).append((zlib.crc32(name.encode()), text))
    eligible = {package: sorted(found) for package, found in files.items() if len(found) >= 5}
    largest = sorted(eligible, key=lambda package: (-sum(len(text) for _, text in eligible[package]), package))
    if len(largest) < packages:
        raise ValueError(
            f"the standard library in {sysconfig.get_paths()['stdlib']} must have {packages} packages of at least five "
            f"files, got {len(largest)}"
        )
    return {package: _package_splits([text for _, text in eligible[package]]) for package in sorted(largest[:packages])}


def _package_splits(texts: list[bytes]) -> dict[str, Tensor]:
    fifth = sum(len(text) for text in texts) / 5
    parts: dict[str, list[bytes]] = {"val": [], "test": [], "train": []}
    for text in texts:
        split = next((split for split in ("val", "test") if sum(map(len, parts[split])) < fifth), "train")
        parts[split].append(text)
    return {split: _joined(parts[split]) for split in SPLITS}


@functools.cache
def _texts() -> list[tuple[str, bytes]]:
    texts: dict[bytes, str] = {}
    for path, name in library_files():
        texts.setdefault(path.read_bytes(), name)
    return [(name, text) for text, name in texts.items() if text]


def _split_of(name: str) -> str:
    return {0: "val", 1: "test"}.get(bucket(name, 10), "train")


def _joined(texts: list[bytes]) -> Tensor:
    if not texts:  # an interpreter without its source
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(b"".join(text + _END_OF_FILE for text in texts)), dtype=torch.uint8)
