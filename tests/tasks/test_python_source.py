"""The tasks on the standard library's source, and the text they share with the demo."""

import math
from collections import Counter

import pytest
import torch

from longvq_layers.tasks import bits_per_byte, standard_library
from longvq_layers.tasks.base import SPLITS
from longvq_layers.tasks.python_source import BytesClassify, BytesLM


@pytest.fixture
def library(monkeypatch, tmp_path):
    """Puts made files in the place of the standard library: {module name: content}."""

    def put(files: dict[str, bytes]) -> None:
        found = []
        for name, text in files.items():
            path = tmp_path / f"{name}.py"
            path.write_bytes(text)
            found.append((path, name))
        monkeypatch.setattr(standard_library, "library_files", lambda: found)
        clear()

    def clear() -> None:
        for function in (standard_library._texts, standard_library.split_bytes, standard_library.package_bytes):
            function.cache_clear()

    yield put
    clear()


def as_bytes(tokens: torch.Tensor) -> bytes:
    return bytes(tokens.tolist())


class TestText:
    def test_every_file_is_in_one_split(self, library):
        files = {f"module{number}": f"text {number}".encode() for number in range(200)}
        library(files)
        parts = {s: as_bytes(standard_library.split_bytes(s)).removesuffix(b"\0").split(b"\0") for s in SPLITS}
        assert sorted(text for texts in parts.values() for text in texts) == sorted(files.values())
        assert len(parts["train"]) > 140 and min(len(parts["val"]), len(parts["test"])) >= 10

    def test_content_that_occurs_twice_is_in_one_split(self, library):
        library({**{f"module{number}": b"the same" for number in range(50)}, "other": b"other", "empty": b""})
        texts = b"".join(as_bytes(standard_library.split_bytes(split)) for split in SPLITS)
        assert sorted(texts.split(b"\0")) == [b"", b"other", b"the same"]

    def test_the_split_does_not_depend_on_the_other_files(self, library):
        files = {f"module{number}": f"text {number}".encode() for number in range(60)}
        library(files)
        before = set(as_bytes(standard_library.split_bytes("val")).split(b"\0"))
        library({name: text for name, text in files.items() if name != "module7"})
        assert set(as_bytes(standard_library.split_bytes("val")).split(b"\0")) == before - {b"text 7"}

    def test_the_real_library_is_long_enough(self):
        sizes = {split: len(standard_library.split_bytes(split)) for split in SPLITS}
        assert sizes["train"] > 4_000_000 and min(sizes.values()) > 300_000

    def test_a_package_gives_a_fifth_to_val_and_test(self, library):
        library({f"{package}.m{n}": f"{package}{n:04}".encode() * 5 for package in "abc" for n in range(50)})
        for package, splits in standard_library.package_bytes(3).items():
            texts = {split: set(as_bytes(text).split(b"\0")) - {b""} for split, text in splits.items()}
            assert {split: len(found) for split, found in texts.items()} == {"train": 30, "val": 10, "test": 10}
            assert all(text.startswith(package.encode()) for found in texts.values() for text in found)

    def test_the_largest_packages_are_taken(self, library):
        sizes = {"a": 3, "b": 9, "c": 5, "d": 7}
        files = {f"{p}.m{n}": f"{p}{n}".encode() * size for p, size in sizes.items() for n in range(6)}
        library({**files, "single": b"long" * 1000})
        assert list(standard_library.package_bytes(3)) == ["b", "c", "d"]
        with pytest.raises(ValueError, match="must have 5 packages of at least five files, got 4"):
            standard_library.package_bytes(5)


class TestBytesLM:
    def test_targets_are_the_next_bytes_of_the_source(self):
        batch = BytesLM(length=50).batch("train", 0, 8)
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        text = as_bytes(standard_library.split_bytes("train"))
        for row, targets in zip(batch.inputs, batch.targets, strict=True):
            assert as_bytes(row) + as_bytes(targets[-1:]) in text

    @pytest.mark.parametrize("length", [4, 7, 20, 199])  # a file has 4 bytes with its end
    def test_validation_predicts_every_byte_once(self, library, length):
        library({f"module{number}": f"{number:03}".encode() for number in range(600)})
        task, text = BytesLM(length=length), as_bytes(standard_library.split_bytes("val"))
        predicted = b"".join(as_bytes(row) for batch in task.batches("val", 3) for row in batch.targets)
        assert predicted == text[1 : 1 + len(predicted)] and 0 <= len(text) - 1 - len(predicted) < length

    def test_training_windows_reach_both_ends(self, library):
        library({f"module{number}": f"{number:02}".encode() for number in range(40)})
        text = as_bytes(standard_library.split_bytes("train"))
        task = BytesLM(length=5)
        windows = {as_bytes(row) for row in task.batch("train", 0, 4000).inputs}
        assert text[:5] in windows and text[-6:-1] in windows
        assert windows == {text[start : start + 5] for start in range(len(text) - 5)}

    def test_a_window_longer_than_the_text(self, library):
        library({f"module{number}": b"%d" % number for number in range(100)})
        with pytest.raises(ValueError, match=r"bytes-lm: length must be below the \d+ bytes of a split, got 100000"):
            BytesLM(length=100000)


class TestBytesClassify:
    def test_a_window_is_from_the_package_of_its_class(self):
        task = BytesClassify(length=100)
        texts = standard_library.package_bytes(8)
        for split in SPLITS:
            batch = task.batch(split, 1, 40)
            for row, target in zip(batch.inputs, batch.targets.tolist(), strict=True):
                assert as_bytes(row) in as_bytes(texts[task.classes[target]][split])

    def test_classes_are_equally_frequent(self):
        task = BytesClassify(length=256)
        for split in ("val", "test"):
            counts = Counter(t for batch in task.batches(split, 64) for t in batch.targets.tolist())
            assert len(set(counts.values())) == 1 and counts.total() == task.size(split) > 200
            assert len(counts) == len(task.classes) == task.num_outputs == 8
        assert task.class_balance("train", 4096).sub(1 / 8).abs().max() < 0.03

    def test_windows_of_the_whole_text_are_drawn(self, library):
        library({f"{p}.m{n}": f"{p}{n:02}".encode() for p in "ab" for n in range(10)})
        task = BytesClassify(length=4, classes=2)
        batch = task.batch("train", 0, 4000)
        drawn = {as_bytes(row) for row in batch.inputs[batch.targets == 0]}
        text = as_bytes(standard_library.package_bytes(2)["a"]["train"])
        assert drawn == {text[start : start + 4] for start in range(len(text) - 3)}

    def test_bad_options(self):
        with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
            BytesClassify(classes=1)
        with pytest.raises(ValueError, match=r"length must be at most the \d+ bytes of \w+ in \w+, got 10000000"):
            BytesClassify(length=10_000_000)


def test_bits_per_byte():
    assert bits_per_byte(math.log(256)) == pytest.approx(8)
    assert bits_per_byte(0.0) == 0
