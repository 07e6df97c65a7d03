"""Handwritten digits as sequences of pixels."""

import functools

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.tasks._requirements import need
from longvq_layers.tasks.base import SPLITS, Batch, Task, stream


class Digits(Task):
    """Classify the digit of an 8x8 picture, whose pixels are tokens of 17 grey levels, row by row.

    The 1797 pictures of scikit-learn in a fixed random split: 1257 train, 270 val, 270 test. The writers are not known,
    so the digits of one writer may be in several splits.

    Args:
        upsample: repeats every pixel in a square of `upsample` x `upsample`, default 1; the length is 64 upsample².

    Raises:
        ValueError, TypeError: upsample out of range. ImportError: scikit-learn is not installed.

    Example:
        >>> Digits(upsample=2).length
        256

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), the test set.
    """

    name = "digits"
    kind = "classify"
    num_inputs = 17
    num_outputs = 10
    random_accuracy = 0.1

    def __init__(self, *, upsample: int = 1) -> None:
        check.positive(self.name, upsample=upsample)
        self.upsample = upsample
        self.length = 64 * upsample**2
        _pictures()  # raises now if scikit-learn is missing, not at the first batch

    def size(self, split: str) -> int | None:
        check.one_of(self.name, "split", split, SPLITS)
        return len(_pictures()[split][1])

    def _take(self, split: str, indices: Tensor) -> Batch:
        pictures, digits = _pictures()[split]
        tokens = pictures[indices].repeat_interleave(self.upsample, 1).repeat_interleave(self.upsample, 2)
        return Batch(tokens.flatten(1), digits[indices])


@functools.cache
def _pictures() -> dict[str, tuple[Tensor, Tensor]]:
    """{split: (pictures (n, 8, 8), digits (n,))}, int64."""
    data = need("digits", "sklearn.datasets").load_digits()
    pictures, digits = torch.as_tensor(data.images).long(), torch.as_tensor(data.target).long()
    order = torch.randperm(len(digits), generator=stream("digits", "split"))
    held_out = 270
    parts = (order[2 * held_out :], order[:held_out], order[held_out : 2 * held_out])
    return {split: (pictures[part], digits[part]) for split, part in zip(SPLITS, parts, strict=True)}
