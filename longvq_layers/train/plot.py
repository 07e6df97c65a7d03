"""The curves of runs as a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot

from longvq_layers.train.log import column, read


def draw(path: Path, folders: Sequence[Path]) -> None:
    """Validation loss over steps and over seconds of training, one line for each run."""
    with pyplot.rc_context({"axes.spines.right": False, "axes.spines.top": False}):
        figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
        for folder in folders:
            rows = read(folder / "log.csv")
            losses = column(rows, "val_loss")
            by_step.plot(column(rows, "step"), losses, marker=".", label=folder.name)
            by_time.plot(column(rows, "seconds"), losses, marker=".", label=folder.name)
        by_step.set(xlabel="step", ylabel="validation loss, nats")
        by_time.set(xlabel="seconds of training")
        by_step.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
