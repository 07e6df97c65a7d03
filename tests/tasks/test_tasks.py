"""What every task guarantees."""

import copy
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from longvq_layers import tasks
from longvq_layers.tasks.base import IGNORED, SPLITS
from tests.tasks.made_files import MAKERS

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "listops": {"min_length": 20, "max_length": 200, "max_depth": 6},
    "mqar": {"length": 64, "pairs": 8, "vocab": 64},
    "selective-copying": {"length": 64},
    "bytes-lm": {"length": 128},
    "bytes-classify": {"length": 128},
}
MADE = [name for name in tasks.NAMES if name not in MAKERS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {name: maker(tmp_path_factory.mktemp(name)) for name, maker in MAKERS.items()}


@pytest.fixture(params=tasks.NAMES)
def task(request, made):
    return tasks.get(request.param, **OPTIONS.get(request.param, {}), **made.get(request.param, {}))


def same(a, b) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def rows(task, batch) -> list[bytes]:
    """What an example shows, without its padding."""
    inputs = batch.inputs.view(len(batch.targets), task.rows_per_target, -1)
    return [hashlib.sha256(row.numpy().tobytes().rstrip(b"\0")).digest() for row in inputs]


def test_a_batch_is_a_function_of_its_arguments(task):
    first = task.batch("train", 3, 4, seed=5)
    task.batch("val", 0, 2)
    torch.rand(3)
    assert same(first, task.batch("train", 3, 4, seed=5))
    assert same(first, copy.deepcopy(task).batch("train", 3, 4, seed=5))
    assert same(first, pickle.loads(pickle.dumps(task)).batch("train", 3, 4, seed=5))
    assert rows(task, first) != rows(task, task.batch("train", 4, 4, seed=5))
    assert rows(task, first) != rows(task, task.batch("train", 3, 4, seed=6))


def test_a_batch_has_the_shapes_and_ranges_that_the_task_says(task):
    assert task.kind in ("classify", "label", "lm") and (task.causal or task.kind != "lm")
    assert 0 < task.random_accuracy < 1 and task.input_dim is None
    for split in SPLITS:
        batch = task.batch(split, 0, 5)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert len(batch.inputs) == 5 * task.rows_per_target and batch.inputs.shape[1] <= task.length
        assert batch.inputs.min() >= 0 and batch.inputs.max() < task.num_inputs
        assert batch.targets.shape == ((5,) if task.kind == "classify" else batch.inputs.shape)
        answers = batch.targets[batch.targets != IGNORED]
        assert len(answers) >= 5 and answers.min() >= 0 and answers.max() < task.num_outputs
        assert task.kind == "label" or len(answers) == batch.targets.numel()
        if batch.key_padding_mask is not None:
            mask = batch.key_padding_mask
            assert mask.dtype == torch.bool and mask.shape == batch.inputs.shape
            assert torch.equal(mask, batch.inputs == 0)  # 0 is kept for padding
            assert not mask.all(dim=0).any()  # no wider than its longest row
            assert (mask.int().diff(dim=1) >= 0).all()  # on the right
        meta = batch.to("meta")
        assert meta.inputs.is_meta and meta.targets.is_meta


def test_splits_share_no_example(task):
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        for batch in task.batches(split, 16, examples=64):
            seen[split].update(rows(task, batch))
    assert all(seen.values())
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]


def test_batches_give_every_example_of_a_finite_split_once(task):
    for split in SPLITS:
        size = task.size(split)
        if size is None:
            with pytest.raises(ValueError, match=f"{task.name}: examples must be given, because {split} is endless"):
                task.batches(split, 8)
            assert sum(len(batch.targets) for batch in task.batches(split, 8, examples=9)) == 16
            continue
        batches = list(task.batches(split, 7))
        assert [len(batch.targets) for batch in batches] == [7] * (size // 7) + [size % 7] * (size % 7 > 0)
        once = [row for batch in batches for row in rows(task, batch)]
        assert sum(len(batch.targets) for batch in task.batches(split, 3, examples=4)) == min(size, 4)
        steps = -(-2 * size // 7)  # batch() starts again, in the middle of a batch
        passes = [row for step in range(steps) for row in rows(task, task.batch(split, step, 7))][: 2 * size]
        assert sorted(passes[:size]) == sorted(passes[size:]) == sorted(once)
        if split == "train":
            assert passes[:size] != passes[size:] and passes[:size] != once
        else:
            assert passes[:size] == passes[size:] == once


def test_class_balance(task):
    shares = task.class_balance("train", 64)
    assert shares.shape == (task.num_outputs,) and float(shares.sum()) == pytest.approx(1)
    assert shares.max() < 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("training", 0, 1), ValueError, "split must be one of 'train', 'val', 'test', got 'training'"),
        (("train", -1, 1), ValueError, "step must be at least 0, got -1"),
        (("train", 0.0, 1), TypeError, "step must be an int, got float"),
        (("train", 0, 0), ValueError, "batch_size must be at least 1, got 0"),
        (("train", 0, 1, "1"), TypeError, "seed must be an int, got str"),
    ],
)
def test_bad_arguments_are_named(task, arguments, error, message):
    with pytest.raises(error, match=f"{task.name}: {message}"):
        task.batch(*arguments)


PROGRAM = """
import hashlib, sys
from longvq_layers import tasks
for name, options in eval(sys.argv[1]).items():
    batch = tasks.get(name, **options).batch("train", 2, 3, seed=1)
    print(hashlib.sha256(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()).hexdigest())
"""


def test_random_numbers_are_the_same_everywhere():
    from longvq_layers.tasks.base import stream

    assert torch.randint(1000, (4,), generator=stream("mqar", "train", 0, 1)).tolist() == [753, 267, 335, 184]


@pytest.mark.slow
def test_another_process_draws_the_same(made):
    every = {name: {**OPTIONS.get(name, {}), **made.get(name, {})} for name in tasks.NAMES}
    every = {name: {k: str(v) if k == "data_dir" else v for k, v in options.items()} for name, options in every.items()}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, repr(every)],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "12"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for (name, options), theirs in zip(every.items(), process.stdout.split(), strict=True):
        batch = tasks.get(name, **options).batch("train", 2, 3, seed=1)
        assert hashlib.sha256(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()).hexdigest() == theirs


class TestRegistry:
    def test_names(self):
        assert len(set(tasks.NAMES)) == len(tasks.NAMES) == 12
        for name in MADE:
            assert tasks.get(name).name == name
            assert f"<task {name}: " in repr(tasks.get(name))

    def test_an_unknown_name_lists_the_known_ones(self):
        with pytest.raises(ValueError, match=r"name must be one of 'listops'.*'lra-pathfinder', got 'lisotps'"):
            tasks.get("lisotps")
        with pytest.raises(ValueError, match="got 3"):
            tasks.options(3)

    def test_an_unknown_option_lists_the_known_ones(self):
        with pytest.raises(
            TypeError, match=r"'mqar' has no option 'vocabulary'.*are length, pairs, vocab, power, fill"
        ):
            tasks.get("mqar", vocabulary=3)

    def test_a_missing_option_is_named(self):
        with pytest.raises(TypeError, match="'lra-imdb' needs the option 'data_dir'"):
            tasks.get("lra-imdb")

    def test_options_can_be_asked_for(self):
        assert tasks.options("digits") == {"upsample": 1}


@pytest.mark.parametrize(
    ("name", "package"), [("digits", "sklearn"), ("lra-cifar", "numpy"), ("lra-pathfinder", "PIL")]
)
def test_a_missing_package_names_the_extra(name, package, made, monkeypatch):
    from longvq_layers.tasks import _requirements, digits

    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(_requirements.importlib, "import_module", missing)
    digits._pictures.cache_clear()
    with pytest.raises(ImportError, match=rf"{name}: needs {package}.*longvq-layers\[tasks\]"):
        tasks.get(name, **made.get(name, {}))
