"""One run of a suite, in a process of its own: `python -m longvq_layers.experiments.one FOLDER` with its settings."""

import json
import os
import sys
from pathlib import Path

from longvq_layers.train import Trainer, TrainSettings

_TEST = 4  # batches of the test for each of an evaluation on the way


def run(folder: Path) -> None:
    """Train what `settings.json` says, going on from a checkpoint if there is one, and write `result.json`."""
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
