"""Train the codes of swapped attention, and its projections if asked for, to do what the original attention did."""

import math
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from longvq_layers.replace import select as choosing
from longvq_layers.replace.distill import checkpoint as _distill_checkpoint
from longvq_layers.replace.distill.report import END_TO_END, DistillPoint, DistillReport
from longvq_layers.replace.distill.setup import NAME, prepared, sites_of
from longvq_layers.replace.distill.teacher_student import Pairs
from longvq_layers.replace.slot import recorder as calibrating

_OUTPUT = "(model output)"
_PROJECTION_SHARE = 0.1  # projections serve pairs inside the window too and were right already: smaller steps


def distill_attention(
    model: nn.Module,
    data: Iterable,
    *,
    steps: int = 200,
    lr: float = 0.01,
    projections: bool = False,
    end_to_end: int = 0,
    held_out: float = 0.1,
    evaluate_every: int = 20,
    patience: int = 5,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    progress: Callable[[DistillPoint], object] | None = None,
) -> DistillReport:
    """Train the codebooks of a model after `replace_attention`, so that its attention comes nearer to the original.

        phase "layers":       mean over modules of ‖swapped − original‖² / ‖original‖², attention outputs, with the
                              inputs that the original model gives to each module
        phase "end to end":   the same ratio of what the model returns, swapped against original all through, plus the
                              mean of that of its attention outputs

    Trained are codewords, their spread, and the gain on it, of causal attention; of bidirectional attention, whose
    codes stand for means of the sequence's own keys, the gain alone, so that ``projections=True`` is what helps there.
    Everything else in the model stays, also its modes and gradients. In the end stand the values that were best on the
    held-out batches. If anything raises, the model is as it was. `restore_attention` brings back the original
    projections too, bit by bit.

    Args:
        model: a model with replaced attention (``local_keys="exact"``), or one that contains it.
        data: model inputs, as `calibration` of `replace_attention`; one batch a step, in an order that `seed` decides.
        steps: of the phase "layers", default 200; 0 leaves it out.
        lr: size of the first steps in proportion to the root mean square of what is trained (Adam), default 0.01; falls
            to 0 along a cosine. Projections take a tenth of it.
        projections: True also trains all parameters of the attention modules themselves. Default False.
        end_to_end: steps of the phase "end to end", default 0.
        held_out: share of the batches, the last ones, that aren't trained with, at least one. Default 0.1.
        evaluate_every: steps between evaluations on the held-out batches, default 20.
        patience: evaluations without a new best after which a phase ends, default 5.
        seed: of the order, default 0.
        checkpoint: file that everything is written to at every evaluation; if it exists, the run goes on from it and
            gives the same curve as one that wasn't interrupted. Default none.
        progress: called with every `DistillPoint`; ``progress=print`` shows them. Default none.

    Returns:
        A report; ``print(report)`` shows the errors before and after.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, no replaced attention, fewer than two
            batches, a checkpoint of another run or that can't be read or written.
        NotImplementedError: ``local_keys="quantized"``.

    Example:
        >>> from longvq_layers import replace_attention
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
        >>> data = [torch.randn(2, 100, 32) for _ in range(4)]
        >>> _ = replace_attention(layer, num_codes=16, window=8, calibration=data)
        >>> report = distill_attention(layer, data, steps=20, evaluate_every=5, projections=True)
        >>> report.after["self_attn"] < report.before["self_attn"]
        True

    Source: layerwise distillation of attention as in Hedgehog (arXiv 2402.04347); gradients of codewords are this
    library's.
    """
    for name, value, least in (
        ("steps", steps, 0),
        ("end_to_end", end_to_end, 0),
        ("evaluate_every", evaluate_every, 1),
        ("patience", patience, 1),
        ("seed", seed, 0),
    ):
        _check_int(name, value, least)
    _check_options(lr, projections, held_out, progress)
    checkpoint = _distill_checkpoint.checked_path(checkpoint)
    sites = sites_of(model)
    calibrating.check_iterable(data, f"{NAME}: data")
    batches = calibrating.as_batches(data, f"{NAME}: data")
    last = max(1, round(held_out * len(batches)))
    if len(batches) <= last:
        raise ValueError(f"{NAME}: data: got {len(batches)} batches, {last} of them held out; expected one more")
    phases = {phase: count for phase, count in (("layers", steps), (END_TO_END, end_to_end)) if count}
    settings = {"phases": phases, "lr": float(lr), "projections": projections, "seed": seed, "patience": patience}
    settings |= {"evaluate_every": evaluate_every, "batches": len(batches), "held_out": last}
    with prepared(model, sites, projections) as (pairs, trained, before):
        if checkpoint is not None:
            settings |= {"data": _distill_checkpoint.digest(batches)}
            with before.undone():  # what every distillation of this model finds, and leaves as it is
                fixed = [*model.parameters(), *(seam.to_metric for seam in pairs.seams.values())]
                settings |= {"model": _distill_checkpoint.fingerprint(fixed)}
        run = _Run(pairs, trained, before, batches[:-last], batches[-last:], settings, checkpoint, progress)
        return run.through()


class _Run:
    """One distillation, from where its checkpoint left it."""

    def __init__(self, pairs: Pairs, trained: dict, before, batches, held_out, settings, checkpoint, progress) -> None:
        self.pairs, self.trained, self.before = pairs, trained, before
        self.batches, self.held_out, self.settings = batches, held_out, settings
        self.path, self.progress = checkpoint, progress
        self.curve: list[DistillPoint] = []
        self.stopped: list[str] = []
        self.first_errors: dict[str, float] = {}
        self.best = {"error": math.inf, "since": 0, "tensors": self._values()}

    def through(self) -> DistillReport:
        """Every phase, or what is left of it; the best values stand in the end."""
        at = self._load()
        if not self.first_errors:
            self.first_errors = self._module_errors()
        for phase, steps in self.settings["phases"].items():
            if at is not None and phase != at["phase"]:
                continue  # behind us
            self._phase(phase, steps, at)
            at = None
        taken = {point.phase: point.step for point in self.curve}
        return DistillReport(
            self.first_errors, self._module_errors(), self.curve, sum(taken.values()), tuple(self.stopped)
        )

    def _phase(self, phase: str, steps: int, at: dict | None) -> None:
        rates = [self.settings["lr"] * self._share(name) * _size(x) for name, x in self.trained.items()]
        groups = [{"params": [x], "lr": rate} for x, rate in zip(self.trained.values(), rates, strict=True)]
        optimizer = torch.optim.Adam(groups)
        step, seen = 0, []
        if at is not None:
            rates, step = at["rates"], at["step"]
            optimizer.load_state_dict(at["optimizer"])
        else:
            self.best = {"error": math.inf, "since": 0, "tensors": self._values()}
            self._evaluate(phase, 0, seen)
            self._save(phase, 0, rates, optimizer)
        while step < steps and self.best["since"] < self.settings["patience"]:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = self._loss(phase, self._batch(step))
            if not bool(loss.isfinite()):
                raise ValueError(f"{NAME}: {phase}, step {step}: the loss is {float(loss)}; try a smaller lr")
            if not loss.requires_grad:
                raise ValueError(
                    f"{NAME}: projections: got False, but nothing else learns in bidirectional attention without "
                    "variance_correction; pass projections=True"
                )
            gradients = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
            for tensor, gradient in zip(self.trained.values(), gradients, strict=True):
                tensor.grad = gradient
            optimizer.step()
            seen.append(loss.item())
            step += 1
            if step % self.settings["evaluate_every"] == 0 or step == steps:
                self._evaluate(phase, step, seen)
                seen.clear()
                self._save(phase, step, rates, optimizer)
        if step < steps and phase not in self.stopped:
            self.stopped.append(phase)
        self._adopt(self.best["tensors"])

    def _loss(self, phase: str, batch: object) -> Tensor:
        with torch.no_grad(), self.before.undone():
            expected, calls = self.pairs.run(batch, original=True)
        if phase != END_TO_END:
            return torch.stack(list(self.pairs.errors(calls).values())).mean()
        output, made = self.pairs.run(batch, original=False)
        outputs = {name: ([o for *_, o in made[name]], [o for *_, o in calls[name]]) for name in calls}
        inside = [self.pairs.error(name, *both) for name, both in outputs.items()]
        return self.pairs.error(next(iter(calls)), [output], [expected]) + torch.stack(inside).mean()

    def _evaluate(self, phase: str, step: int, seen: list[float]) -> None:
        with torch.no_grad():
            error = sum(self._loss(phase, batch).item() for batch in self.held_out) / len(self.held_out)
        if error < self.best["error"]:
            self.best = {"error": error, "since": 0, "tensors": self._values()}
        else:
            self.best["since"] += 1
        self.curve.append(DistillPoint(phase, step, error, sum(seen) / len(seen) if seen else math.nan))
        if self.progress is not None:
            self.progress(self.curve[-1])

    @torch.no_grad()
    def _module_errors(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for batch in self.held_out:
            with self.before.undone():
                expected, calls = self.pairs.run(batch, original=True)
            errors = self.pairs.errors(calls)
            if END_TO_END in self.settings["phases"]:
                output, _ = self.pairs.run(batch, original=False)
                errors[_OUTPUT] = self.pairs.error(next(iter(calls)), [output], [expected])
            for name, error in errors.items():
                sums[name] = sums.get(name, 0.0) + error.item()
        return {name: (error / len(self.held_out)) ** 0.5 for name, error in sums.items()}

    def _batch(self, step: int) -> object:
        # A new order every time the batches are used up; it depends on the step alone, so that a run can be resumed.
        epoch, place = divmod(step, len(self.batches))
        generator = torch.Generator().manual_seed(self.settings["seed"] * 1_000_003 + epoch)
        return self.batches[int(torch.randperm(len(self.batches), generator=generator)[place])]

    def _share(self, name: str) -> float:
        return _PROJECTION_SHARE if isinstance(self.trained[name], nn.Parameter) else 1.0

    def _values(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.trained.items()}

    @torch.no_grad()
    def _adopt(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self.trained.items():
            tensor.copy_(values[name])

    def _save(self, phase: str, step: int, rates: list[float], optimizer: torch.optim.Optimizer) -> None:
        if self.path is None:
            return
        curve = [(point.phase, point.step, point.error, point.train_error) for point in self.curve]
        state = {"phase": phase, "step": step, "rates": rates, "optimizer": optimizer.state_dict(), "curve": curve}
        state |= {"settings": self.settings, "tensors": self._values(), "best": self.best, "stopped": self.stopped}
        _distill_checkpoint.write(self.path, {**state, "first_errors": self.first_errors})

    def _load(self) -> dict | None:
        if self.path is None or not self.path.exists():
            return None
        state = _distill_checkpoint.read(self.path)
        shapes = {name: tuple(x.shape) for name, x in state["tensors"].items()}
        theirs = {**state["settings"], "tensors": shapes}
        mine = {**self.settings, "tensors": {name: tuple(x.shape) for name, x in self.trained.items()}}
        differ = [name for name in mine if not _distill_checkpoint.same(theirs.get(name), mine[name])]
        if differ:
            raise ValueError(
                f"{NAME}: checkpoint: {self.path} is of a run with another {choosing.shorten(differ)}; use another "
                "file, or the same settings"
            )
        self.curve = [DistillPoint(*point) for point in state["curve"]]
        self.best, self.first_errors, self.stopped = state["best"], state["first_errors"], state["stopped"]
        self._adopt(state["tensors"])
        return state


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{NAME}: {name}: got {type(value).__name__}, expected an int")
    if value < least:
        raise ValueError(f"{NAME}: {name}: got {value}, expected at least {least}")


def _check_options(lr: object, projections: object, held_out: object, progress: object) -> None:
    if not isinstance(projections, bool):
        raise TypeError(f"{NAME}: projections: got {type(projections).__name__}, expected True or False")
    for name, value, most in (("lr", lr, math.inf), ("held_out", held_out, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{NAME}: {name}: got {type(value).__name__}, expected a number")
        if not 0 < value < most:
            raise ValueError(f"{NAME}: {name}: got {value}, expected more than 0 and less than {most:g}")
    if progress is not None and not callable(progress):
        raise TypeError(f"{NAME}: progress: got {type(progress).__name__}, expected a callable or None")


def _size(tensor: Tensor) -> float:
    # Root mean square; of a tensor of zeros that of a small one, so that it can move.
    return max(tensor.detach().float().square().mean().sqrt().item(), 1e-3)
