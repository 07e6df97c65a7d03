"""The health of a run: columns of the log, which do not change the run, and a diagnosis at its end."""

import contextlib

import pytest
import torch

from longvq_layers.train import Trainer, TrainSettings
from longvq_layers.train import __main__ as command
from longvq_layers.train import trainer as trainer_module
from longvq_layers.train.log import COLUMNS
from tests.train.test_trainer import TINY, curve, weights

SEEN = ("attention_entropy", "output_gate")


class _Blind:
    """A monitor without readings."""

    entropy, output_gates = {}, {}


def test_monitoring_does_not_change_the_run(tmp_path, monkeypatch):
    seen = Trainer(TrainSettings(**TINY), tmp_path / "seen")
    seen.run()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in seen.model.modules())
    monkeypatch.setattr(trainer_module, "Monitor", lambda model: contextlib.nullcontext(_Blind))
    blind = Trainer(TrainSettings(**TINY), tmp_path / "blind")
    blind.run()
    with_it, without = curve(tmp_path / "seen"), curve(tmp_path / "blind")
    assert all(0 < row.pop(name) < 1 for row in with_it for name in SEEN)
    assert all(row.pop(name) is None for row in without for name in SEEN)
    assert with_it == without
    assert all(torch.equal(value, weights(blind)[name]) for name, value in weights(seen).items())


@pytest.mark.parametrize(("block", "columns"), [("mega", {"output_gate"}), ("transformer", set())])
def test_columns_of_other_blocks(tmp_path, block, columns):
    Trainer(TrainSettings(**{**TINY, "block": block, "block_options": {}, "steps": 2}), tmp_path).run()
    (row,) = curve(tmp_path)
    assert {name for name in SEEN if row[name] is not None} == columns
    assert set(SEEN) <= set(COLUMNS)


def arguments(folder, *more):
    sizes = ["--d-model", "8", "--depth", "1", "--batch-size", "2", "--eval-batches", "1", "--quiet"]
    task = ["--task-option", "length=16", "--task-option", "pairs=2", "--task-option", "vocab=16"]
    return ["mqar", *task, *sizes, "--steps", "3", "--out", str(folder), *more]


def test_the_command_ends_with_a_diagnosis(tmp_path, capsys):
    command.main(arguments(tmp_path))
    assert "health: healthy" in capsys.readouterr().out


def test_the_command_names_the_parameter_that_diverged(tmp_path, capsys, monkeypatch):
    def spoil(trainer, progress):
        trainer.model.encoder.backbone.blocks[0].q_proj.weight.data[0, 0] = torch.nan
        trainer.train_step()

    monkeypatch.setattr(Trainer, "run", spoil)
    with pytest.raises(FloatingPointError, match="is not finite"):
        command.main(arguments(tmp_path))
    assert "error: encoder.backbone.blocks.0.q_proj.weight: 1 of" in capsys.readouterr().out
