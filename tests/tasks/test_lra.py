"""The loaders of the Long Range Arena's files, on small files in the same layouts."""

import pickle

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("PIL")

from longvq_layers import tasks
from longvq_layers.tasks.base import SPLITS
from longvq_layers.tasks.listops import tokenize
from tests.tasks import made_files


@pytest.fixture
def load(tmp_path):
    def load(name, **options):
        return tasks.get(name, **{**made_files.MAKERS[name](tmp_path), **options})

    return load


def examples(task, split):
    """(tokens without padding, target) of every example; tokens of two rows where a target has two."""
    for batch in task.batches(split, 3):
        mask = torch.zeros_like(batch.inputs).bool() if batch.key_padding_mask is None else batch.key_padding_mask
        rows = [row[~ignored].tolist() for row, ignored in zip(batch.inputs, mask, strict=True)]
        if task.rows_per_target == 2:
            rows = list(zip(rows[::2], rows[1::2], strict=True))
        yield from zip(rows, batch.targets.tolist(), strict=True)


def text(tokens: list[int]) -> bytes:
    return bytes(token - 1 for token in tokens)


class TestIMDB:
    def test_reviews_and_labels(self, load):
        task = load("lra-imdb")
        found = [[*text(row).split(b" ")[:3], target] for split in SPLITS for row, target in examples(task, split)]
        assert all(target == {b"pos": 1, b"neg": 0}[label] for _, label, _, target in found)
        assert len({(part, label, number) for part, label, number, _ in found}) == 240
        assert all(text(row).startswith(b"test ") for row, _ in examples(task, "test")) and task.size("test") == 120
        assert 2 <= task.size("val") <= 30 and task.size("val") + task.size("train") == 120
        longest = max((text(row) for row, _ in examples(task, "test")), key=len)
        assert longest.endswith(b" 59 " + b"\xc3\xa9" * 59)

    def test_long_reviews_are_cut(self, load):
        task = load("lra-imdb", length=9)
        assert {len(row) for row, _ in examples(task, "test")} == {9} and task.length == 9

    def test_an_empty_review_is_all_padding(self, load, tmp_path):
        task = load("lra-imdb")
        for path in (tmp_path / "aclImdb" / "test").glob("*/*.txt"):
            path.write_bytes(b"")
        batch = task.batch("test", 0, 2)
        assert batch.inputs.tolist() == [[0], [0]] and batch.key_padding_mask.all()

    def test_a_missing_part(self, load, tmp_path):
        load("lra-imdb")
        (tmp_path / "aclImdb" / "test" / "neg").rename(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError, match=r"lra-imdb: data_dir must be .*, got no .*aclImdb/test/neg"):
            tasks.get("lra-imdb", data_dir=tmp_path / "aclImdb")


class TestAAN:
    def test_joined(self, load):
        task = load("lra-aan", length=30)
        assert [task.size(split) for split in SPLITS] == [11, 4, 5] and task.length == 61
        for split, part in zip(SPLITS, ("train", "eval", "test"), strict=True):
            for i, (row, target) in enumerate(examples(task, split)):
                middle = row.index(257)
                assert text(row[:middle]) == f'first "{part} {i}'.encode() and target == i % 2
                assert text(row[middle + 1 :]) == f"second {part} {'x' * i}".encode()[:30]

    def test_pairs_are_adjacent_rows(self, load):
        task = load("lra-aan", layout="pairs", length=12)
        assert task.rows_per_target == 2 and task.length == 12
        for i, ((first, second), target) in enumerate(examples(task, "train")):
            assert text(first) == f'first "train {i}'.encode()[:12] and target == i % 2
            assert text(second) == f"second train {'x' * i}".encode()[:12]

    @pytest.mark.parametrize("line", ["1.0\ta\tb\tno second text", "2\ta\tb\tc\td", "label\ta\tb\tc\td"])
    def test_a_malformed_line(self, load, tmp_path, line):
        task = load("lra-aan")
        (tmp_path / "tsv_data" / "new_aan_pairs.eval.tsv").write_text(f"0.0\ta\tb\tc\td\n{line}\n")
        with pytest.raises(ValueError, match=r"line 2 of .*eval\.tsv must have five fields"):
            list(task.batches("val", 4))

    def test_a_missing_file(self, load, tmp_path):
        load("lra-aan")
        (tmp_path / "tsv_data" / "new_aan_pairs.eval.tsv").unlink()
        with pytest.raises(FileNotFoundError, match=r"lra-aan: data_dir must be .*, got no .*new_aan_pairs\.eval\.tsv"):
            tasks.get("lra-aan", data_dir=tmp_path)


class TestListOps:
    def test_examples(self, load):
        task = load("lra-listops")
        assert [task.size(split) for split in SPLITS] == [11, 4, 5]
        for split, salt in zip(SPLITS, (1, 2, 3), strict=True):
            for i, (row, target) in enumerate(examples(task, split)):
                assert row == tokenize(f"[MAX {salt} {i // 10} {i % 10} ]") and target == max(salt, i // 10, i % 10)

    def test_long_expressions_are_cut(self, load):
        assert [row for row, _ in examples(load("lra-listops", length=2), "val")] == [tokenize("[MAX 2")] * 4

    @pytest.mark.parametrize("line", ["( [MAX 1 ) ]", "( [MAX 1 ) ]\t10", "( [MAX 1 ) ]\tx"])
    def test_a_malformed_line(self, load, tmp_path, line):
        task = load("lra-listops")
        (tmp_path / "basic_val.tsv").write_text(f"Source\tTarget\n{line}\n")
        with pytest.raises(ValueError, match=r"line 2 of .*basic_val\.tsv must be an expression, a tab and a digit"):
            task.size("val")


class TestCIFAR:
    def test_grey_pixels_and_labels(self, load, tmp_path):
        task = load("lra-cifar")
        assert [task.size(split) for split in SPLITS] == [36, 4, 8]
        folder = tmp_path / "cifar-10-batches-py"
        for split, name, at in (("train", "data_batch_1", 0), ("val", "data_batch_5", 4), ("test", "test_batch", 0)):
            content = pickle.loads((folder / name).read_bytes())
            batch = next(task.batches(split, 4))
            assert batch.targets.tolist() == content[b"labels"][at : at + 4]
            red, green, blue = content[b"data"][at : at + 4].astype(float).reshape(4, 3, 1024).transpose(1, 0, 2)
            grey = torch.tensor(0.2989 * red + 0.587 * green + 0.114 * blue)
            assert (batch.inputs - grey).abs().max() < 1 and (batch.inputs - grey).mean().abs() < 0.3

    def test_white_is_255_and_black_is_0(self, load, tmp_path):
        import numpy

        load("lra-cifar")
        data = numpy.zeros((2, 3072), dtype=numpy.uint8)
        data[0] = 255
        path = tmp_path / "cifar-10-batches-py" / "test_batch"
        path.write_bytes(pickle.dumps({b"data": data, b"labels": [3, 4]}, protocol=3))
        inputs = tasks.get("lra-cifar", data_dir=path.parent).batch("test", 0, 2).inputs
        assert inputs[0].unique().tolist() == [255] and inputs[1].unique().tolist() == [0]

    def test_a_pickle_of_python_2(self, load, tmp_path):
        """The real files name `numpy.core.multiarray` and hold 8-bit strings, which Python 3 doesn't write."""
        load("lra-cifar")
        path = tmp_path / "cifar-10-batches-py" / "test_batch"
        pixels = bytes(range(256)) * 12
        path.write_bytes(
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            b"T" + len(pixels).to_bytes(4, "little") + pixels + b"tbU\x06labels]K\x07au."
        )
        batch = tasks.get("lra-cifar", data_dir=tmp_path).batch("test", 0, 1)
        assert batch.targets.tolist() == [7]
        assert (batch.inputs[0] - torch.arange(1024) % 256).abs().max() <= 1

    @pytest.mark.parametrize("call", ["print", "eval", "open"])
    def test_a_pickle_that_would_call_something_is_refused(self, load, tmp_path, call, capsys):
        load("lra-cifar")
        path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
        path.write_bytes(f"cbuiltins\n{call}\n(S'/tmp'\ntR.".encode())
        with pytest.raises(
            ValueError, match=rf"data_batch_2 must be a file of CIFAR-10.*must name arrays only, got builtins\.{call}"
        ):
            tasks.get("lra-cifar", data_dir=tmp_path)
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({b"data": 1}), pickle.dumps([])])
    def test_a_file_of_another_kind(self, load, tmp_path, content):
        load("lra-cifar")
        (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
        with pytest.raises(ValueError, match="test_batch must be a file of CIFAR-10's Python version"):
            tasks.get("lra-cifar", data_dir=tmp_path)


class TestPathfinder:
    def test_pictures_and_labels(self, load):
        task = load("lra-pathfinder")
        assert [task.size(split) for split in SPLITS] == [19, 2, 2]  # without the empty file
        for split in SPLITS:
            for row, target in examples(task, split):
                assert row[0] == target and len(row) == 1024

    def test_pixels(self, load, tmp_path):
        from PIL import Image

        task = load("lra-pathfinder")
        name = task._names["test"][0]
        picture = Image.open(task.root / name)
        assert next(examples(task, "test"))[0] == [picture.getpixel((x, y)) for y in range(32) for x in range(32)]

    def test_a_picture_of_another_size(self, load, tmp_path):
        load("lra-pathfinder")
        (tmp_path / "pathfinder32").rename(tmp_path / "pathfinder64")
        with pytest.raises(ValueError, match=r"must have 64 x 64 pixels, got \(32, 32\)"):
            tasks.get("lra-pathfinder", data_dir=tmp_path, resolution=64).batch("test", 0, 1)

    def test_bad_metadata(self, load, tmp_path):
        load("lra-pathfinder")
        (tmp_path / "pathfinder32" / "curv_contour_length_14" / "metadata" / "0.npy").write_text("imgs/0 a.png 0 2\n")
        with pytest.raises(ValueError, match=r"line 1 of .*0\.npy must be folder, file, number, label"):
            tasks.get("lra-pathfinder", data_dir=tmp_path)

    def test_a_missing_picture(self, load, tmp_path):
        load("lra-pathfinder")
        (tmp_path / "pathfinder32" / "curv_contour_length_14" / "imgs" / "1" / "sample_3.png").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"lra-pathfinder: data_dir must be .*, got no .*imgs/1/sample_3\.png"
        ):
            tasks.get("lra-pathfinder", data_dir=tmp_path)


EXPECTED = {
    "lra-imdb": "train/pos",
    "lra-aan": "new_aan_pairs.train.tsv",
    "lra-listops": "basic_train.tsv",
    "lra-cifar": "data_batch_1",
    "lra-pathfinder": "curv_contour_length_14/metadata",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_folder_without_the_data_names_what_is_expected(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{name}: data_dir must be .*, got no {tmp_path / EXPECTED[name]}"):
        tasks.get(name, data_dir=tmp_path)
    with pytest.raises(TypeError, match=f"{name}: data_dir must be a path, got int"):
        tasks.get(name, data_dir=3)
