"""The Long Range Arena's tasks on pictures, from the user's files: pixels are tokens of 256 grey levels."""

import pickle
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.tasks._requirements import need
from longvq_layers.tasks.base import SPLITS, Batch, Task
from longvq_layers.tasks.lra.files import existing, folder_with, shuffled

# The names in the pickles of CIFAR-10, and NumPy's newer name for one of them. Other names could run any code.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
_DIFFICULTIES = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}


class LRAImage(Task):
    """Classify a grey 32x32 picture into ten classes: the Long Range Arena's Image (CIFAR-10).

    Grey is ⌊255.5 (0.2989 R + 0.587 G + 0.114 B)/255⌋, as TensorFlow's `rgb_to_grayscale` computes it. Val is the last
    tenth of the training files.

    Args:
        data_dir: the folder `cifar-10-batches-py` of CIFAR-10's Python version, or its parent. Its pickles may build
            arrays only.

    Raises:
        FileNotFoundError: a file does not exist. ValueError: a file is not one of CIFAR-10's. ImportError: NumPy is
        missing.

    Source: Krizhevsky 2009; Tay et al. 2020 (arXiv 2011.04006).
    """

    name = "lra-cifar"
    kind = "classify"
    num_inputs = 256
    num_outputs = 10
    length = 1024
    random_accuracy = 0.1

    def __init__(self, *, data_dir: str | PathLike[str]) -> None:
        need(self.name, "numpy")
        folder = folder_with(self.name, data_dir, "data_batch_1", "cifar-10-batches-py")
        train = [_cifar_file(existing(self.name, folder / f"data_batch_{n}")) for n in range(1, 6)]
        pixels, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
        val = len(labels) - len(labels) // 10
        test = _cifar_file(existing(self.name, folder / "test_batch"))
        parts = ((pixels[:val], labels[:val]), (pixels[val:], labels[val:]), test)
        self._pictures = dict(zip(SPLITS, parts, strict=True))

    def size(self, split: str) -> int | None:
        check.one_of(self.name, "split", split, SPLITS)
        return len(self._pictures[split][1])

    def _take(self, split: str, indices: Tensor) -> Batch:
        pixels, labels = self._pictures[split]
        return Batch(pixels[indices].long(), labels[indices])


class LRAPathfinder(Task):
    """Does a dashed path join the two dots of a picture (1) or not (0)? The Long Range Arena's Pathfinder.

    In an order that depends only on the names, the first 80 % of the pictures are train, then 10 % val, 10 % test. (The
    Long Range Arena uses the order of TensorFlow Datasets.) Empty files are left out; the release has one.

    Args:
        data_dir: the folder `pathfinder32` (or `pathfinder128` for Path-X) of the release, or its parent.
        resolution: 32 (default), 64, 128 or 256; the length is its square.
        difficulty: "hard" (default; what the Long Range Arena reports), "intermediate" or "easy".

    Raises:
        FileNotFoundError: a file does not exist. ValueError, TypeError: unknown options, a bad line of the metadata, or
        a picture of another size. ImportError: Pillow is missing.

    Source: Linsley et al. 2018 (arXiv 1805.08315); Tay et al. 2020 (arXiv 2011.04006).
    """

    name = "lra-pathfinder"
    kind = "classify"
    num_inputs = 256
    num_outputs = 2
    random_accuracy = 0.5

    def __init__(self, *, data_dir: str | PathLike[str], resolution: int = 32, difficulty: str = "hard") -> None:
        check.one_of(self.name, "resolution", resolution, (32, 64, 128, 256))
        check.one_of(self.name, "difficulty", difficulty, tuple(_DIFFICULTIES))
        need(self.name, "PIL.Image")
        self.resolution, self.difficulty, self.length = resolution, difficulty, resolution**2
        inside = (f"pathfinder{resolution}", f"lra_release/pathfinder{resolution}")
        folder = _DIFFICULTIES[difficulty]
        self.root = folder_with(self.name, data_dir, f"{folder}/metadata", *inside) / folder
        self._labels = self._metadata()
        names = shuffled([name for name in self._labels if self._has_content(name)])
        tenth = len(names) // 10
        ends = (len(names) - 2 * tenth, len(names) - tenth)
        parts = (names[: ends[0]], names[ends[0] : ends[1]], names[ends[1] :])
        self._names = dict(zip(SPLITS, parts, strict=True))

    def size(self, split: str) -> int | None:
        check.one_of(self.name, "split", split, SPLITS)
        return len(self._names[split])

    def _metadata(self) -> dict[str, int]:
        """{path of a picture: label}; the files are text, although their names end in .npy."""
        labels = {}
        for path in (self.root / "metadata").glob("*.npy"):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                fields = line.split()
                if len(fields) < 4 or fields[3] not in ("0", "1"):
                    raise ValueError(
                        f"lra-pathfinder: line {number} of {path} must be folder, file, number, label (0 or 1) and "
                        f"more, got {line[:60]!r}"
                    )
                labels[f"{fields[0]}/{fields[1]}"] = int(fields[3])
        if not labels:
            raise FileNotFoundError(f"lra-pathfinder: metadata must have lines, got none in {self.root}/metadata/*.npy")
        return labels

    def _has_content(self, name: str) -> bool:
        return existing(self.name, self.root / name).stat().st_size > 0

    def _take(self, split: str, indices: Tensor) -> Batch:
        names = [self._names[split][index] for index in indices.tolist()]
        return Batch(
            torch.stack([self._pixels(self.root / name) for name in names]),
            torch.tensor([self._labels[name] for name in names]),
        )

    def _pixels(self, path: Path) -> Tensor:
        with need(self.name, "PIL.Image").open(path) as picture:
            if picture.size != (self.resolution, self.resolution):
                raise ValueError(
                    f"lra-pathfinder: {path} must have {self.resolution} x {self.resolution} pixels, got {picture.size}"
                )
            return torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8).long()


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of arrays and refuses everything else."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")  # Python 2 wrote these pickles

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the pickle must name arrays only, got {module}.{name}")
        return super().find_class(module, name)


def _cifar_file(path: Path) -> tuple[Tensor, Tensor]:
    """Grey pixels (n, 1024) uint8 and labels (n,) of one of CIFAR-10's files."""
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file).load()
        data, labels = torch.as_tensor(content[b"data"]), torch.tensor(content[b"labels"])
        if data.dtype != torch.uint8 or data.dim() != 2 or data.shape != (len(labels), 3072):
            raise ValueError(f"data of shape {tuple(data.shape)} and {data.dtype} for {len(labels)} labels")
        if not ((labels >= 0) & (labels < 10)).all():
            raise ValueError("labels that are not 0 … 9")
    # A damaged pickle raises many types; the user needs the path.
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"lra-cifar: {path} must be a file of CIFAR-10's Python version: {error}") from error
    weights = torch.tensor([0.2989, 0.587, 0.114])[:, None]
    grey = (data.view(-1, 3, 1024).float() / 255 * weights).sum(1)
    return (grey * 255.5).to(torch.uint8), labels
