"""The base class of tasks: batches are a pure function of (split, step, batch size, seed)."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longvq_layers import _checks as check

SPLITS = ("train", "val", "test")
IGNORED = -100  # the target that torch's cross entropy ignores


@dataclass
class Batch:
    """Examples of a task.

    Attributes:
        inputs: (B, L) int64 tokens, or (B, L, C) float32.
        targets: (B,) int64 classes, or (B, L) int64 with -100 at positions that have no target.
        key_padding_mask: (B, L) bool, True at padding; None without padding.
    """

    inputs: Tensor
    targets: Tensor
    key_padding_mask: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same examples on another device."""
        mask = self.key_padding_mask
        return Batch(
            self.inputs.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            None if mask is None else mask.to(device, non_blocking=non_blocking),
        )


class Task:
    """Examples to train and compare sequence models with.

    A subclass sets the attributes. It implements `_draw` for endless splits, `_take` and `size` for finite ones.

    Attributes:
        name: as in `tasks.NAMES`.
        kind: "classify" (a class per sequence), "label" (a class per position) or "lm" (the next token; causal).
        num_inputs: size of the input vocabulary; None if the inputs are vectors.
        input_dim: size of these vectors; None for tokens.
        num_outputs: number of classes.
        length: length of the longest sequence.
        causal: whether the model must be causal; otherwise it may be.
        random_accuracy: accuracy of a uniform guess among the possible answers.
        rows_per_target: 1; or 2 if targets[i] belongs to the pair of rows inputs[2i] and inputs[2i + 1].
    """

    name: str
    kind: ClassVar[str]
    num_inputs: int | None
    input_dim: int | None = None
    num_outputs: int
    length: int
    causal: bool = False
    random_accuracy: float
    rows_per_target: int = 1

    def size(self, split: str) -> int | None:
        """Number of examples of a split; None if it is endless."""
        check.one_of(self.name, "split", split, SPLITS)
        return None

    def batch(self, split: str, step: int, batch_size: int, seed: int = 0) -> Batch:
        """The examples of a step; the same arguments give the same examples.

        Args:
            split: "train", "val" or "test"; they share no examples.
            step: from 0. A finite training set is shuffled for every epoch, and examples of the next epoch fill the
                last batch of an epoch. Finite val and test sets repeat in their order.
            batch_size: at least 1.
            seed: of the random examples or the shuffling, default 0.
        """
        check.positive(self.name, batch_size=batch_size)
        check.integer(self.name, "step", step, 0)
        check.integer(self.name, "seed", seed)
        size = self.size(split)
        if size is None:
            return self._draw(split, batch_size, stream(self.name, split, seed, step))
        indices = torch.arange(step * batch_size, (step + 1) * batch_size)
        if split == "train":
            indices = torch.cat([self._shuffled(int(e), size, seed)[i] for e, i in _by_epoch(indices, size)])
        return self._take(split, indices % size)

    def batches(self, split: str, batch_size: int, examples: int | None = None) -> Iterator[Batch]:
        """The examples of a finite split once, in their order; the last batch may be smaller.

        Args:
            split: "train", "val" or "test".
            batch_size: at least 1.
            examples: only so many examples, default all. An endless split needs this; its examples are those of
                `batch` with seed 0, rounded up to whole batches.
        """
        check.positive(self.name, batch_size=batch_size)
        if examples is not None:
            check.positive(self.name, examples=examples)
        size = self.size(split)
        if size is None and examples is None:
            raise ValueError(
                f"{self.name}: examples must be given, because {split} is endless, got None; or use batch()"
            )
        return self._batches(split, batch_size, size, examples)

    def class_balance(self, split: str = "train", examples: int = 1000) -> Tensor:
        """(num_outputs,) share of each class among the targets of the first `examples`.

        The maximum is the accuracy of a model that always gives the commonest answer.
        """
        counts = torch.zeros(self.num_outputs, dtype=torch.int64)
        for batch in self.batches(split, min(64, examples), examples):
            counts += torch.bincount(batch.targets[batch.targets != IGNORED], minlength=self.num_outputs)
        return counts / counts.sum().clamp(min=1)

    def _draw(self, split: str, batch_size: int, generator: torch.Generator) -> Batch:
        """Random examples of an endless split."""
        raise NotImplementedError

    def _take(self, split: str, indices: Tensor) -> Batch:
        """The examples (B,) of a finite split."""
        raise NotImplementedError

    def _batches(self, split: str, batch_size: int, size: int | None, examples: int | None) -> Iterator[Batch]:
        if size is None:
            for step in range(-(-(examples or 0) // batch_size)):
                yield self.batch(split, step, batch_size)
        else:
            for indices in torch.split(torch.arange(size if examples is None else min(size, examples)), batch_size):
                yield self._take(split, indices)

    def _shuffled(self, epoch: int, size: int, seed: int) -> Tensor:
        return torch.randperm(size, generator=stream(self.name, "shuffle", seed, epoch))

    def __repr__(self) -> str:
        return f"<task {self.name}: {self.kind}, length {self.length}, {self.num_outputs} outputs>"


def stream(*key: object) -> torch.Generator:
    """A random generator that depends only on `key` (strings and ints), in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def padded(sequences: list[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of tokens as rows (B, L) int64 with their padding mask (B, L); L is the longest length."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    tokens = torch.full((len(sequences), max(1, int(lengths.max()))), pad, dtype=torch.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens, torch.arange(tokens.shape[1]) >= lengths[:, None]


def _by_epoch(positions: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    epochs = positions // size
    for epoch in epochs.unique():
        yield int(epoch), positions[epochs == epoch] % size
