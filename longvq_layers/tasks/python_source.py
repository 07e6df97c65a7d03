"""Bytes of the Python standard library: predict the next byte, or classify the package."""

import math

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.tasks import standard_library
from longvq_layers.tasks.base import SPLITS, Batch, Task


class BytesLM(Task):
    """Predict the next byte of Python source.

    Training windows start anywhere in the source of the training files. Val and test windows are adjacent, so that
    every byte of their files is predicted exactly once, except the first byte and an incomplete window at the end.
    Files are joined in a fixed order, each followed by a zero byte.

    Args:
        length: of a window, default 1024.

    Raises:
        ValueError, TypeError: length out of range, or not below the bytes of a split.

    Example:
        >>> batch = BytesLM(length=16).batch("val", 0, 2)
        >>> bool((batch.inputs[:, 1:] == batch.targets[:, :-1]).all())
        True
    """

    name = "bytes-lm"
    kind = "lm"
    num_inputs = num_outputs = 256
    causal = True
    random_accuracy = 1 / 256

    def __init__(self, *, length: int = 1024) -> None:
        check.positive(self.name, length=length)
        self.length = length
        shortest = min(len(standard_library.split_bytes(split)) for split in SPLITS)
        if length >= shortest:
            raise ValueError(f"bytes-lm: length must be below the {shortest} bytes of a split, got {length}")

    def size(self, split: str) -> int | None:
        """Number of windows of val or test; None for train, which is endless."""
        check.one_of(self.name, "split", split, SPLITS)
        return None if split == "train" else (len(standard_library.split_bytes(split)) - 1) // self.length

    def _draw(self, split: str, batch_size: int, generator: torch.Generator) -> Batch:
        text = standard_library.split_bytes(split)
        return self._windows(text, torch.randint(len(text) - self.length, (batch_size,), generator=generator))

    def _take(self, split: str, indices: Tensor) -> Batch:
        return self._windows(standard_library.split_bytes(split), indices * self.length)

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        windows = text[starts[:, None] + torch.arange(self.length + 1)].long()
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


class BytesClassify(Task):
    """Classify which package of the standard library a window of source comes from.

    The classes are the packages with the most source, in alphabetical order (`classes`). For training, all classes are
    equally likely, and windows start anywhere in a package's training files. Val and test windows are adjacent in other
    files. All classes have as many of them as the smallest class, and alternate.

    Args:
        length: of a window, default 512.
        classes: number of packages, at least 2, default 8.

    Raises:
        ValueError, TypeError: options out of range, or the library is too small for them.

    Attributes:
        classes: the names of the packages.

    Example:
        >>> BytesClassify(length=64).batch("train", 0, 2).inputs.shape
        torch.Size([2, 64])
    """

    name = "bytes-classify"
    kind = "classify"
    num_inputs = 256

    def __init__(self, *, length: int = 512, classes: int = 8) -> None:
        check.positive(self.name, length=length)
        check.integer(self.name, "classes", classes, 2)
        packages = standard_library.package_bytes(classes)
        self.length, self.num_outputs, self.random_accuracy = length, classes, 1 / classes
        self.classes = tuple(packages)
        self._texts = {split: [packages[package][split] for package in self.classes] for split in SPLITS}
        for package, splits in packages.items():
            for split, text in splits.items():
                if len(text) < length:
                    raise ValueError(
                        f"bytes-classify: length must be at most the {len(text)} bytes of {package} in {split}, got "
                        f"{length}"
                    )

    def size(self, split: str) -> int | None:
        """Number of windows of val or test; None for train, which is endless."""
        check.one_of(self.name, "split", split, SPLITS)
        if split == "train":
            return None
        return self.num_outputs * min(len(text) // self.length for text in self._texts[split])

    def _draw(self, split: str, batch_size: int, generator: torch.Generator) -> Batch:
        targets = torch.randint(self.num_outputs, (batch_size,), generator=generator)
        room = torch.tensor([len(text) - self.length + 1 for text in self._texts[split]])[targets]
        starts = (torch.rand(batch_size, generator=generator, dtype=torch.float64) * room).long()
        return self._windows(split, targets, starts)

    def _take(self, split: str, indices: Tensor) -> Batch:
        return self._windows(split, indices % self.num_outputs, indices // self.num_outputs * self.length)

    def _windows(self, split: str, targets: Tensor, starts: Tensor) -> Batch:
        texts = self._texts[split]
        pairs = zip(targets.tolist(), starts.tolist(), strict=True)
        return Batch(torch.stack([texts[t][start : start + self.length] for t, start in pairs]).long(), targets)


def bits_per_byte(nats: float) -> float:
    """Bits per byte of a cross entropy in nats per byte.

    Example:
        >>> round(bits_per_byte(math.log(256)), 6)
        8.0
    """
    return nats / math.log(2)
