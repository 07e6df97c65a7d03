"""The time of a training step of each variant; measured apart from the runs, because they share the machine."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from longvq_layers.benchmarks.common.timing import interleaved_medians
from longvq_layers.experiments.suites import Suite
from longvq_layers.train import Trainer


def step_times(suite: Suite, repeats: int = 9) -> dict[str, float]:
    """Seconds of a step of every variant on one thread, as in the runs; medians of interleaved rounds."""
    threads = torch.get_num_threads()
    try:
        with TemporaryDirectory() as folder:
            trainers = {
                label: Trainer(replace(suite.settings(label, 0), threads=1), Path(folder) / str(number))
                for number, label in enumerate(suite.variants)
            }
            for trainer in trainers.values():
                trainer.model.train()
            return interleaved_medians({label: trainer.train_step for label, trainer in trainers.items()}, repeats)
    finally:
        torch.set_num_threads(threads)
