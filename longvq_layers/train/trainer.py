"""The training loop: steps, evaluations, checkpoints."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch
from torch import nn

from longvq_layers import tasks
from longvq_layers.health import Monitor
from longvq_layers.layers import Codebook, commitment_loss, optimizer_groups
from longvq_layers.train import checkpoint, model
from longvq_layers.train.evaluation import evaluate, loss_of
from longvq_layers.train.log import Log
from longvq_layers.train.schedule import Schedule
from longvq_layers.train.settings import TrainSettings


class Trainer:
    """Trains the model of `settings` and writes everything to a folder.

    The folder gets `settings.json`, `log.csv` and `checkpoint.pt`. If it has a checkpoint, the run continues from it,
    and ends with the same weights and the same curve as an uninterrupted run.

    Args:
        settings: of the run.
        folder: made if it does not exist.

    Raises:
        ValueError: the folder holds a run with other settings or is a file; eval_batches=0 with an endless task.

    Example:
        >>> trainer = Trainer(TrainSettings("selective-copying", {"length": 32}, steps=2, d_model=16), "/tmp/run")
        >>> trainer.run()["val_accuracy"] >= 0
        True
    """

    def __init__(self, settings: TrainSettings, folder: Path | str) -> None:
        self.settings, self.folder = settings, Path(folder)
        self.task = tasks.get(settings.task, **settings.task_options)
        if not settings.eval_batches and self.task.size("val") is None:
            raise ValueError(f"Trainer: eval_batches must be at least 1, because {settings.task!r} is endless, got 0")
        self._check_folder()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.model = model.build(settings, self.task)
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(self.model, lr=settings.lr, weight_decay=settings.weight_decay, ssm_lr=settings.ssm_lr)
        )
        self._schedule = Schedule(self.optimizer, settings.warmup)
        self.step, self.seconds = 0, 0.0
        if self._checkpoint.exists():
            progress = checkpoint.load(self._checkpoint, self.model, self.optimizer)
            self.step, self.seconds = int(progress["step"]), float(progress["seconds"])
        self.folder.mkdir(parents=True, exist_ok=True)  # last: settings that don't work leave no folder
        settings.save(self._settings_file)
        self._log = Log(self.folder / "log.csv", self.step)

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return model.count(self.model)

    @property
    def done(self) -> bool:
        """Whether all steps are taken, or all time is used."""
        limit = self.settings.seconds
        return self.step >= self.settings.steps or (limit is not None and self.seconds >= limit)

    def run(self, progress: Callable[[dict[str, float]], None] = lambda row: None) -> dict[str, float]:
        """Train to the end.

        Args:
            progress: called after every step with "step", "train_loss" and more columns of the log; after an
                evaluation with all of them.

        Returns:
            The last line of the log; for a run that is already complete, an evaluation of its model.
        """
        settings = self.settings
        row: dict[str, float] = {}
        self.model.train()
        while not self.done:
            row = self.train_step()
            if self.step % settings.eval_every == 0 or self.done:
                row |= self._evaluate()
                self._log.write(row)
            if self.done or (settings.checkpoint_every and self.step % settings.checkpoint_every == 0):
                self.save()
            progress(row)
        return row or {"step": self.step, "seconds": self.seconds, **self._evaluate()}

    def save(self) -> None:
        """Write the checkpoint."""
        checkpoint.save(self._checkpoint, self.model, self.optimizer, {"step": self.step, "seconds": self.seconds})

    def test(self, batches: int = 0) -> dict[str, float]:
        """Loss and score on the test set.

        Args:
            batches: how many; 0 = all of a finite set, and `eval_batches` of an endless one.
        """
        if not batches and self.task.size("test") is None:
            batches = self.settings.eval_batches
        return evaluate(self.model, self.task, "test", self.settings.batch_size, batches)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def _settings_file(self) -> Path:
        return self.folder / "settings.json"

    def _check_folder(self) -> None:
        path = self._settings_file
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"Trainer: folder must be a folder, got the file {self.folder}")
        if path.exists() and (difference := self.settings.difference(TrainSettings.load(path))):
            raise ValueError(
                f"Trainer: folder must be new or hold a run with these settings, got {self.folder} with other settings "
                f"({difference}, asked for and found); choose another folder or delete it"
            )

    def train_step(self) -> dict[str, float]:
        """One optimiser step on the next batch, as `run` takes it; the model must be in training mode."""
        start = perf_counter()
        batch = self.task.batch("train", self.step, self.settings.batch_size, self.settings.seed)
        rate = self._schedule.set_rates(self.step, self._share())
        loss = loss_of(self.model(batch.inputs, batch.key_padding_mask), batch.targets)
        commitment = commitment_loss(self.model)
        self.optimizer.zero_grad()
        (loss + commitment).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        if not math.isfinite(norm.item()):
            raise FloatingPointError(
                f"Trainer: the gradient of step {self.step + 1} is not finite (loss {loss.item()}); lower lr, or see "
                "longvq_layers.health.diagnose(trainer.model)"
            )
        self.optimizer.step()
        self.step += 1
        self.seconds += perf_counter() - start
        return {
            "step": self.step,
            "seconds": self.seconds,
            "train_loss": loss.item(),
            "commitment": commitment.item(),
            "lr": self.settings.lr * rate,
            "grad_norm": norm.item(),
        }

    def _share(self) -> float:
        """The share of the training that is done: of the steps or, if it is larger, of the time."""
        share = self.step / self.settings.steps
        return share if self.settings.seconds is None else max(share, self.seconds / self.settings.seconds)

    def _evaluate(self) -> dict[str, float]:
        settings = self.settings
        with Monitor(self.model) as monitor:
            scores = evaluate(self.model, self.task, "val", settings.batch_size, settings.eval_batches)
        books = [module for module in self.model.modules() if isinstance(module, Codebook)]
        row = {f"val_{name}": value for name, value in scores.items()}
        if books:
            row["codes_used"] = _mean([book.usage(within=100) for book in books])
            row["perplexity"] = _mean([book.perplexity() for book in books])
            row["quantization_error"] = _mean([book.quantization_error() for book in books])
        if monitor.entropy:
            row["attention_entropy"] = fmean(reading.average for reading in monitor.entropy.values())
        if monitor.output_gates:
            row["output_gate"] = fmean(reading.mean[0] for reading in monitor.output_gates.values())
        return row


def _mean(values: list[torch.Tensor]) -> float:
    return float(torch.cat(values).mean())
