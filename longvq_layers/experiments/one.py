"""One run of a suite, in a process of its own: `python -m longvq_layers.experiments.one FOLDER` with its settings."""

import json
import os
import sys
from pathlib import Path

from longvq_layers.train import Trainer, TrainSettings

_TEST = 4  # times as many batches as an evaluation during training


def run(folder: Path) -> None:
    """Train by `settings.json`, continue from a checkpoint if there is one, and write `result.json`."""
    trainer = Trainer(TrainSettings.load(folder / "settings.json"), folder)
    trainer.run()
    result = {
        "parameters": trainer.parameters,
        "steps": trainer.step,
        "test": trainer.test(_TEST * trainer.settings.eval_batches),  # 0 = all of a finite set
    }
    unfinished = folder / "result.unfinished"
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(unfinished, folder / "result.json")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
