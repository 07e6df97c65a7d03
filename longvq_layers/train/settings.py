"""The settings of a training run; they determine what it computes."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from longvq_layers import _checks as check


@dataclass(frozen=True)
class TrainSettings:
    """A run: the same settings give the same curve.

    Attributes:
        task, task_options: see `tasks.get`.
        block, block_options: of `models.SequenceEncoder`.
        d_model, depth: width and number of the blocks.
        causal: whether the blocks see only the past even if the task does not need it.
        parameters: if given, `d_ff` of the blocks is chosen so that the model has about that many parameters.
        dropout: of the model.
        gradient_checkpointing: whether blocks are computed again during backward.
        steps: optimiser steps.
        seconds: if given, training ends also after that time in steps. The learning rate then falls with the share of
            steps or of time, whichever is larger. Two such runs differ.
        batch_size: sequences per step.
        lr, weight_decay, ssm_lr: see `optimizer_groups`.
        warmup: steps in which the learning rate rises linearly; then it falls by a cosine to a tenth.
        grad_clip: largest norm of the gradient.
        seed: of the initial weights, the order of the data and all random numbers of training.
        eval_every: steps between evaluations; the last step is always evaluated.
        eval_batches: batches of an evaluation; 0 = all of a finite set.
        checkpoint_every: steps between checkpoints; 0 = only at the end.
        threads: of PyTorch; None = unchanged. The last bits of the results depend on them.
    """

    task: str
    task_options: dict[str, Any] = field(default_factory=dict)
    block: str = "longvq"
    block_options: dict[str, Any] = field(default_factory=dict)
    d_model: int = 128
    depth: int = 2
    causal: bool = False
    parameters: int | None = None
    dropout: float = 0.0
    gradient_checkpointing: bool = False
    steps: int = 1000
    seconds: float | None = None
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    ssm_lr: float = 1e-3
    warmup: int = 100
    grad_clip: float = 1.0
    seed: int = 0
    eval_every: int = 200
    eval_batches: int = 16
    checkpoint_every: int = 500
    threads: int | None = None

    def __post_init__(self) -> None:
        name = "TrainSettings"
        check.positive(name, steps=self.steps, batch_size=self.batch_size, eval_every=self.eval_every)
        for option in ("warmup", "eval_batches", "checkpoint_every"):
            if getattr(self, option) < 0:
                raise ValueError(f"{name}: {option} must be 0 or more, got {getattr(self, option)}")
        if self.parameters is not None:
            check.positive(name, parameters=self.parameters)
            if "d_ff" in self.block_options:
                raise ValueError(
                    f"{name}: parameters, which chooses d_ff, or d_ff in block_options must be given, not both"
                )
        if self.threads is not None:
            check.positive(name, threads=self.threads)
        for option in ("lr", "grad_clip", "seconds"):
            if getattr(self, option) is not None and not getattr(self, option) > 0:
                raise ValueError(f"{name}: {option} must be above 0, got {getattr(self, option)}")

    def save(self, path: Path) -> None:
        """Write JSON."""
        unfinished = path.with_suffix(".unfinished")  # if the run is killed now, the old settings remain
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> "TrainSettings":
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))

    def difference(self, other: "TrainSettings") -> str:
        """The settings in which the two differ, as text; empty if none."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return ", ".join(f"{name}: {mine!r} and {theirs!r}" for name, mine, theirs in pairs if mine != theirs)
