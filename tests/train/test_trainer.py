"""Training: the same settings give the same curve, also after being killed."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch

from longvq_layers import tasks
from longvq_layers.train import Trainer, TrainSettings, checkpoint
from longvq_layers.train import __main__ as command
from longvq_layers.train import model as models
from longvq_layers.train import trainer as trainer_module
from longvq_layers.train.evaluation import evaluate, loss_of
from longvq_layers.train.log import TIMES, read

TINY = {
    "task": "selective-copying",
    "task_options": {"length": 20, "memorise": 2, "vocab": 6},
    "block_options": {"num_codes": 8, "window": 4, "d_state": 4},
    "d_model": 8,
    "depth": 1,
    "batch_size": 4,
    "eval_every": 2,
    "eval_batches": 2,
    "checkpoint_every": 2,
    "warmup": 2,
    "dropout": 0.1,
    "steps": 8,
}


def curve(folder):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read(folder / "log.csv")]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 3, 4, 7])
def test_a_killed_run_continues_to_the_same_curve(tmp_path, killed_at):
    settings = TrainSettings(**TINY)
    whole = Trainer(settings, tmp_path / "whole")
    last = whole.run()

    def kill(row):
        if row["step"] == killed_at:
            raise Killed

    with pytest.raises(Killed):
        Trainer(settings, tmp_path / "killed").run(kill)
    torch.manual_seed(123)  # another process has another random state
    resumed = Trainer(settings, tmp_path / "killed")
    assert resumed.step == killed_at // 2 * 2
    again = resumed.run()

    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert {k: v for k, v in again.items() if k not in TIMES} == {k: v for k, v in last.items() if k not in TIMES}
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_the_curve_depends_only_on_the_seed(tmp_path):
    for folder in ("a", "b"):
        Trainer(TrainSettings(**TINY), tmp_path / folder).run()
    Trainer(TrainSettings(**TINY, seed=1), tmp_path / "c").run()
    assert curve(tmp_path / "a") == curve(tmp_path / "b") != curve(tmp_path / "c")


def test_a_complete_run_is_not_trained_further(tmp_path):
    settings = TrainSettings(**TINY)
    trainer = Trainer(settings, tmp_path)
    trainer.run()
    again = Trainer(settings, tmp_path)
    assert again.done and again.run()["step"] == settings.steps
    for name, value in weights(trainer).items():
        assert torch.equal(weights(again)[name], value), name
    assert len(curve(tmp_path)) == 4


def test_a_folder_belongs_to_one_run(tmp_path):
    Trainer(TrainSettings(**TINY), tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(lr: 0\.01 and 0\.001, asked for and found\)"):
        Trainer(TrainSettings(**TINY, lr=0.01), tmp_path)


def test_wrong_settings_leave_no_folder(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'codes'"):
        Trainer(TrainSettings(**{**TINY, "block_options": {"codes": 3}}), tmp_path / "run")
    with pytest.raises(
        ValueError, match="eval_batches must be at least 1, because 'selective-copying' is endless, got 0"
    ):
        Trainer(TrainSettings(**{**TINY, "eval_batches": 0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Trainer(TrainSettings(**TINY), tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be a folder, got the file"):
        Trainer(TrainSettings(**TINY), tmp_path / "file")


def test_an_interrupted_save_keeps_the_old_settings(tmp_path, monkeypatch):
    TrainSettings(**TINY).save(tmp_path / "settings.json")
    monkeypatch.setattr("os.replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        TrainSettings(**TINY, lr=0.5).save(tmp_path / "settings.json")
    assert TrainSettings.load(tmp_path / "settings.json") == TrainSettings(**TINY)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=false", False), ("a=True", True), ("a=none", None), ("a=3", 3), ("a=[1,2]", [1, 2]), ("a=laplace", "laplace")],
)
def test_options_of_the_command(text, value):
    assert command._option(text) == ("a", value)


def test_an_interrupted_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(TrainSettings(**TINY), tmp_path)
    trainer.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def half(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        trainer.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_time_limit_ends_the_run_and_lowers_the_rate(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(trainer_module, "perf_counter", lambda: float(next(ticks)))  # a step takes one second
    trainer = Trainer(TrainSettings(**{**TINY, "steps": 100_000, "seconds": 6.0, "warmup": 0}), tmp_path)
    trainer.run()
    assert (trainer.step, trainer.seconds) == (6, 6.0)
    assert [row["lr"] for row in read(tmp_path / "log.csv")] == pytest.approx(
        [1e-3 * (0.55 + 0.45 * math.cos(math.pi * share / 6)) for share in (1, 3, 5)]
    )


def test_the_loss_falls(tmp_path):
    settings = TrainSettings(**{**TINY, "steps": 150, "eval_every": 50, "lr": 1e-2, "dropout": 0.0, "batch_size": 16})
    Trainer(settings, tmp_path).run()
    losses = [row["val_loss"] for row in curve(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]


def test_gradient_checkpointing_gives_the_same_curve(tmp_path):
    for name, on in (("on", True), ("off", False)):
        Trainer(TrainSettings(**TINY, gradient_checkpointing=on), tmp_path / name).run()
    for first, second in zip(curve(tmp_path / "on"), curve(tmp_path / "off"), strict=True):
        numbers = {name: value for name, value in second.items() if value is not None}
        assert {name: first[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)


@pytest.mark.parametrize("block", ["longvq", "mega", "spade", "s4d", "transformer"])
def test_parameters_chooses_the_feed_forward_width(block):
    task = tasks.get("listops-short")
    settings = TrainSettings("listops-short", block=block, d_model=32, parameters=60_000)
    assert models.count(models.build(settings, task)) == pytest.approx(60_000, rel=0.01)
    with pytest.raises(ValueError, match=r"parameters must be above .* got 3,000"):
        models.build(TrainSettings("listops-short", block=block, d_model=32, parameters=3000), task)


def test_evaluation_counts_targets_not_batches():
    class Fixed(torch.nn.Module):
        def forward(self, inputs, mask):
            return torch.nn.functional.one_hot(inputs, 256).float() * 50

    task = tasks.get("bytes-lm", length=64)
    model = Fixed()
    scores = evaluate(model, task, "val", 4, 3)
    right = total = 0
    for step in range(3):
        batch = task.batch("val", step, 4)
        right, total = right + int((batch.inputs == batch.targets).sum()), total + batch.targets.numel()
    assert scores["accuracy"] == right / total
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] / 0.6931471805599453)
    assert model.training


def test_loss_ignores_positions_without_an_answer():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [-100, -100, 4]])
    kept = torch.nn.functional.cross_entropy(logits[targets != -100], targets[targets != -100])
    assert torch.allclose(loss_of(logits, targets), kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"warmup": -1}, "warmup must be 0 or more"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"parameters": 1000, "block_options": {"d_ff": 3}}, "not both"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**{**TINY, **change})


def test_the_command(tmp_path):
    start = [sys.executable, "-m", "longvq_layers.train", "mqar", "--block", "s4d", "--causal", "--steps", "4"]
    options = ["--task-option", "length=16", "--task-option", "pairs=2", "--task-option", "vocab=16", "--d-model", "8"]
    options += ["--eval-every", "2", "--eval-batches", "1", "--batch-size", "2", "--plot", "--out", str(tmp_path)]
    done = subprocess.run([*start, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "s4d" in done.stdout and "test: loss" in done.stdout and "health: healthy" in done.stdout
    assert (tmp_path / "curve.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "settings.json").read_text())["task_options"] == {
        "length": 16,
        "pairs": 2,
        "vocab": 16,
    }
    assert [row["step"] for row in read(tmp_path / "log.csv")] == [2, 4]
