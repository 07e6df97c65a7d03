"""The Long Range Arena's tasks on text, from the user's files: reviews, pairs of papers, expressions."""

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.tasks import listops
from longvq_layers.tasks.base import SPLITS, Batch, Task, padded
from longvq_layers.tasks.lra.files import existing, folder_with, shuffled, tsv_rows
from longvq_layers.tasks.standard_library import bucket

_SEPARATOR = 257  # 0 is padding, 1 … 256 are bytes


class LRAText(Task):
    """Is a film review positive (1) or negative (0)? The Long Range Arena's Text, byte by byte.

    Tokens are byte + 1; 0 is padding. A tenth of the training reviews, chosen by name, is val; the Long Range Arena
    itself validates on the test set.

    Args:
        data_dir: the folder `aclImdb` of the Large Movie Review Dataset, or its parent.
        length: bytes of a review, default 4096; the rest is cut off.

    Raises:
        FileNotFoundError: the reviews do not exist. ValueError, TypeError: options out of range.

    Source: Maas et al. 2011 (ACL); Tay et al. 2020 (arXiv 2011.04006).
    """

    name = "lra-imdb"
    kind = "classify"
    num_inputs = 257
    num_outputs = 2
    random_accuracy = 0.5

    def __init__(self, *, data_dir: str | PathLike[str], length: int = 4096) -> None:
        check.positive(self.name, length=length)
        self.length = length
        self.root = folder_with(self.name, data_dir, "train/pos", "aclImdb")
        train, test = ([*self._reviews(part, "neg"), *self._reviews(part, "pos")] for part in ("train", "test"))
        held_out = {name for name in train if bucket(name, 10) == 0}
        parts = ([name for name in train if name not in held_out], list(held_out), test)
        self._names = {split: shuffled(names) for split, names in zip(SPLITS, parts, strict=True)}

    def size(self, split: str) -> int | None:
        check.one_of(self.name, "split", split, SPLITS)
        return len(self._names[split])

    def _reviews(self, part: str, label: str) -> list[str]:
        folder = existing(self.name, self.root / part / label)
        return [f"{part}/{label}/{path.name}" for path in folder.glob("*.txt")]

    def _take(self, split: str, indices: Tensor) -> Batch:
        names = [self._names[split][index] for index in indices.tolist()]
        tokens, mask = padded([_bytes_of((self.root / name).read_bytes(), self.length) for name in names])
        return Batch(tokens, torch.tensor([int(name.split("/")[1] == "pos") for name in names]), mask)


class LRARetrieval(Task):
    """Does one of two papers cite the other (1) or not (0)? The Long Range Arena's Retrieval, byte by byte.

    Tokens are byte + 1; 0 is padding, 257 separates the papers of a joined sequence.

    Args:
        data_dir: the folder with `new_aan_pairs.train.tsv`, `.eval.tsv` and `.test.tsv`; or its parent, where it is
            called `tsv_data`.
        length: bytes of one paper, default 4000 as in the Long Range Arena; the rest is cut off.
        layout: "joined" (default): both papers in one row with a separator between them. "pairs": two rows 2i and
            2i + 1 for target i, which a model encodes separately, as in the Long Range Arena.

    Raises:
        FileNotFoundError: a file does not exist. ValueError, TypeError: options out of range, or a line without the
        five fields label, two names, two texts.

    Source: Radev et al. 2013 (ACL Anthology Network); Tay et al. 2020 (arXiv 2011.04006).
    """

    name = "lra-aan"
    kind = "classify"
    num_inputs = 258
    num_outputs = 2
    random_accuracy = 0.5

    def __init__(self, *, data_dir: str | PathLike[str], length: int = 4000, layout: str = "joined") -> None:
        check.positive(self.name, length=length)
        check.one_of(self.name, "layout", layout, ("joined", "pairs"))
        self.text_length, self.layout = length, layout
        self.length = 2 * length + 1 if layout == "joined" else length
        self.rows_per_target = 1 if layout == "joined" else 2
        folder = folder_with(self.name, data_dir, "new_aan_pairs.train.tsv", "tsv_data", "lra_release/tsv_data")
        files = [folder / f"new_aan_pairs.{part}.tsv" for part in ("train", "eval", "test")]
        self._files = {s: existing(self.name, file) for s, file in zip(SPLITS, files, strict=True)}
        self._lines: dict[str, Tensor] = {}  # offset of each line; the files may be larger than the memory

    def size(self, split: str) -> int | None:
        check.one_of(self.name, "split", split, SPLITS)
        if split not in self._lines:
            self._lines[split] = _line_starts(self._files[split])
        return len(self._lines[split])

    def _take(self, split: str, indices: Tensor) -> Batch:
        self.size(split)
        rows, targets = [], []
        with self._files[split].open("rb") as file:
            for index in indices.tolist():
                file.seek(int(self._lines[split][index]))
                label, *texts = self._fields(file.readline(), split, index)
                targets.append(label)
                rows += (
                    texts if self.layout == "pairs" else [torch.cat([texts[0], torch.tensor([_SEPARATOR]), texts[1]])]
                )
        tokens, mask = padded(rows)
        return Batch(tokens, torch.tensor(targets), mask)

    def _fields(self, line: bytes, split: str, index: int) -> tuple[int, Tensor, Tensor]:
        fields = line.rstrip(b"\r\n").split(b"\t")
        if len(fields) != 5 or fields[0] not in (b"0", b"1", b"0.0", b"1.0"):
            raise ValueError(
                f"lra-aan: line {index + 1} of {self._files[split]} must have five fields, label (0 or 1), id1, id2, "
                f"text1 and text2, got {len(fields)} and the label {fields[0][:20]!r}"
            )
        return int(fields[0][:1]), _bytes_of(fields[3], self.text_length), _bytes_of(fields[4], self.text_length)


class LRAListOps(Task):
    """`ListOps` from the files of the Long Range Arena, with the same tokens as `ListOps`.

    Args:
        data_dir: the folder with `basic_train.tsv`, `basic_val.tsv` and `basic_test.tsv`; or its parent, where it is
            called `listops-1000`.
        length: tokens of an expression, default 2000 as in the Long Range Arena; the rest is cut off.

    Raises:
        FileNotFoundError: a file does not exist. ValueError, TypeError: length out of range, or a bad line.

    Source: Tay et al. 2020 (arXiv 2011.04006).
    """

    name = "lra-listops"
    kind = "classify"
    num_inputs = listops.ListOps.num_inputs
    num_outputs = 10
    random_accuracy = 0.1

    def __init__(self, *, data_dir: str | PathLike[str], length: int = 2000) -> None:
        check.positive(self.name, length=length)
        self.length = length
        inside = ("listops-1000", "lra_release/listops-1000")
        folder = folder_with(self.name, data_dir, "basic_train.tsv", *inside)
        self._files = {s: existing(self.name, folder / f"basic_{s}.tsv") for s in SPLITS}
        self._examples: dict[str, tuple[list[Tensor], Tensor]] = {}

    def size(self, split: str) -> int | None:
        check.one_of(self.name, "split", split, SPLITS)
        if split not in self._examples:
            self._examples[split] = self._read(self._files[split])
        return len(self._examples[split][0])

    def _take(self, split: str, indices: Tensor) -> Batch:
        self.size(split)
        sequences, targets = self._examples[split]
        tokens, mask = padded([sequences[index] for index in indices.tolist()])
        return Batch(tokens, targets[indices], mask)

    def _read(self, path: Path) -> tuple[list[Tensor], Tensor]:
        sequences, targets = [], []
        for number, fields in tsv_rows(path):
            if number == 1 and fields == ["Source", "Target"]:
                continue
            if len(fields) != 2 or len(fields[1]) != 1 or fields[1] not in "0123456789":
                raise ValueError(
                    f"lra-listops: line {number} of {path} must be an expression, a tab and a digit, got {len(fields)} "
                    f"fields, the last {fields[-1:]}"
                )
            sequences.append(torch.tensor(listops.tokenize(fields[0])[: self.length], dtype=torch.uint8))
            targets.append(int(fields[1]))
        return sequences, torch.tensor(targets)


def _bytes_of(text: bytes, length: int) -> Tensor:
    return torch.tensor(list(text[:length]), dtype=torch.int64) + 1


def _line_starts(path: Path) -> Tensor:
    starts, start = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                starts.append(start)
            start += len(line)
    return torch.tensor(starts, dtype=torch.int64)
