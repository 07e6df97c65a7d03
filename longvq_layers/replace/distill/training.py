"""The training loop of distillation, from the start or from where its checkpoint left it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longvq_layers.replace.distill import checkpoint
from longvq_layers.replace.distill.report import END_TO_END, DistillPoint, DistillReport
from longvq_layers.replace.distill.setup import NAME, Prepared
from longvq_layers.replace.model_inputs import ModelInputs
from longvq_layers.replace.select import shorten

_MODEL_OUTPUT = "(model output)"  # its name in the report
_PROJECTION_RATE = 0.1  # of the learning rate; projections already fit pairs inside the window


@dataclass(frozen=True)
class DistillSettings:
    """The settings of a run. A checkpoint only continues a run with equal settings.

    Attributes:
        phases: name -> steps.
        batches: number of all batches.
        held_out: number of the batches that only measure errors.
        data, model: hash of the batches and fingerprint of the original model, with a checkpoint.
        Others as in `distill_attention`.
    """

    phases: dict[str, int]
    lr: float
    projections: bool
    seed: int
    patience: int
    evaluate_every: int
    batches: int
    held_out: int
    data: str | None = None
    model: list[float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The settings as a checkpoint holds them."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class Best:
    """The best held-out error of a phase, the evaluations since then, and the trained values that gave it."""

    error: float
    since: int
    tensors: dict[str, Tensor]


class Distillation:
    """One run.

    Args:
        model: the prepared model.
        batches: to train with.
        held_out: to evaluate on.
        settings: of the run.
        path: of the checkpoint, or None.
        progress: called with every evaluation, or None.
    """

    def __init__(
        self,
        model: Prepared,
        batches: Sequence[ModelInputs],
        held_out: Sequence[ModelInputs],
        settings: DistillSettings,
        path: Path | None,
        progress: Callable[[DistillPoint], object] | None,
    ) -> None:
        self.compared, self.trained, self.before = model.compared, model.trained, model.before
        self.batches, self.held_out, self.settings = batches, held_out, settings
        self.path, self.progress = path, progress
        self.curve: list[DistillPoint] = []
        self.stopped: list[str] = []
        self.first_errors: dict[str, float] = {}
        self.best = Best(math.inf, 0, self._values())

    def run(self) -> DistillReport:
        """Run every phase, or what is left of it; the best values stay."""
        saved = self._load()
        if not self.first_errors:
            self.first_errors = self._module_errors()
        for phase, steps in self.settings.phases.items():
            if saved is not None and phase != saved["phase"]:
                continue  # done before the checkpoint was written
            self._run_phase(phase, steps, saved)
            saved = None
        taken = {point.phase: point.step for point in self.curve}
        return DistillReport(
            self.first_errors, self._module_errors(), self.curve, sum(taken.values()), tuple(self.stopped)
        )

    def _run_phase(self, phase: str, steps: int, saved: dict[str, Any] | None) -> None:
        rates = [self._learning_rate(tensor) for tensor in self.trained.values()]
        optimizer = torch.optim.Adam(
            [{"params": [x], "lr": rate} for x, rate in zip(self.trained.values(), rates, strict=True)]
        )
        step = 0
        losses: list[float] = []
        if saved is not None:
            rates, step = saved["rates"], saved["step"]
            optimizer.load_state_dict(saved["optimizer"])
        else:
            self.best = Best(math.inf, 0, self._values())
            self._evaluate(phase, 0, losses)
            self._save(phase, 0, rates, optimizer)
        while step < steps and self.best.since < self.settings.patience:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            losses.append(self._step(phase, step, optimizer))
            step += 1
            if step % self.settings.evaluate_every == 0 or step == steps:
                self._evaluate(phase, step, losses)
                losses.clear()
                self._save(phase, step, rates, optimizer)
        if step < steps and phase not in self.stopped:
            self.stopped.append(phase)
        self._adopt(self.best.tensors)

    def _step(self, phase: str, step: int, optimizer: torch.optim.Optimizer) -> float:
        loss = self._loss(phase, self._batch(step))
        if not bool(loss.isfinite()):
            raise ValueError(
                f"{NAME}: lr must keep the loss finite, got {float(loss)} in {phase}, step {step}; try a smaller lr"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"{NAME}: projections must be True, got False, but nothing else learns in bidirectional attention "
                "without variance_correction; pass projections=True"
            )
        gradients = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
        for tensor, gradient in zip(self.trained.values(), gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        return loss.item()

    def _loss(self, phase: str, batch: ModelInputs) -> Tensor:
        with torch.no_grad(), self.before.undone():
            expected, taught = self.compared.run(batch, teacher=True)
        if phase != END_TO_END:
            return torch.stack(list(self.compared.errors(taught).values())).mean()
        output, made = self.compared.run(batch, teacher=False)
        inside = [self.compared.error(name, made[name].outputs, taught[name].outputs) for name in taught]
        return self.compared.error(next(iter(taught)), [output], [expected]) + torch.stack(inside).mean()

    def _evaluate(self, phase: str, step: int, losses: Sequence[float]) -> None:
        with torch.no_grad():
            error = sum(self._loss(phase, batch).item() for batch in self.held_out) / len(self.held_out)
        if error < self.best.error:
            self.best = Best(error, 0, self._values())
        else:
            self.best.since += 1
        self.curve.append(DistillPoint(phase, step, error, sum(losses) / len(losses) if losses else math.nan))
        if self.progress is not None:
            self.progress(self.curve[-1])

    @torch.no_grad()
    def _module_errors(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for batch in self.held_out:
            with self.before.undone():
                expected, taught = self.compared.run(batch, teacher=True)
            errors = self.compared.errors(taught)
            if END_TO_END in self.settings.phases:
                output, _ = self.compared.run(batch, teacher=False)
                errors[_MODEL_OUTPUT] = self.compared.error(next(iter(taught)), [output], [expected])
            for name, error in errors.items():
                sums[name] = sums.get(name, 0.0) + error.item()
        return {name: (error / len(self.held_out)) ** 0.5 for name, error in sums.items()}

    def _batch(self, step: int) -> ModelInputs:
        """A new order in every epoch. It depends on the step alone, so that a run can be resumed."""
        epoch, place = divmod(step, len(self.batches))
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return self.batches[int(torch.randperm(len(self.batches), generator=generator)[place])]

    def _learning_rate(self, tensor: Tensor) -> float:
        """In proportion to the root mean square, at least 1e-3: otherwise a tensor of zeros could not move."""
        size = max(tensor.detach().float().square().mean().sqrt().item(), 1e-3)
        share = _PROJECTION_RATE if isinstance(tensor, nn.Parameter) else 1.0
        return self.settings.lr * share * size

    def _values(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.trained.items()}

    @torch.no_grad()
    def _adopt(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self.trained.items():
            tensor.copy_(values[name])

    def _save(self, phase: str, step: int, rates: list[float], optimizer: torch.optim.Optimizer) -> None:
        if self.path is None:
            return
        state = {
            "phase": phase,
            "step": step,
            "rates": rates,
            "optimizer": optimizer.state_dict(),
            "curve": [(point.phase, point.step, point.error, point.train_error) for point in self.curve],
            "settings": self.settings.as_dict(),
            "tensors": self._values(),
            "best": vars(self.best),
            "stopped": self.stopped,
            "first_errors": self.first_errors,
        }
        checkpoint.write(self.path, state)

    def _load(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        state = checkpoint.read(self.path)
        saved = {**state["settings"], "tensors": _shapes(state["tensors"])}
        current = {**self.settings.as_dict(), "tensors": _shapes(self.trained)}
        differ = [name for name in current if not checkpoint.same(saved.get(name), current[name])]
        if differ:
            raise ValueError(
                f"{NAME}: checkpoint must be of the same run, got {self.path}, which is of a run with another "
                f"{shorten(differ)}; use another file, or the same settings"
            )
        self.curve = [DistillPoint(*point) for point in state["curve"]]
        self.best, self.first_errors, self.stopped = Best(**state["best"]), state["first_errors"], state["stopped"]
        self._adopt(state["tensors"])
        return state


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items()}
