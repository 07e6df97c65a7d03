"""What distillation reports: the points of its curve, and the errors before and after."""

from dataclasses import dataclass, field

LAYERS, END_TO_END = "layers", "end to end"  # the phases


@dataclass(frozen=True)
class DistillPoint:
    """One evaluation on the held-out batches.

    Attributes:
        phase: "layers" or "end to end".
        step: steps of this phase so far.
        error: what the phase minimises, see `distill_attention`.
        train_error: the same on the training batches since the last evaluation; NaN before the first step.
    """

    phase: str
    step: int
    error: float
    train_error: float

    def __str__(self) -> str:
        return f"{self.phase}, step {self.step}: error {self.error:.4f} held out, {self.train_error:.4f} in training"


@dataclass
class DistillReport:
    """What `distill_attention` did; ``print`` shows a table.

    Attributes:
        before, after: name -> ‖swapped − original‖ / ‖original‖ of each attention module's output, on the held-out
            batches, with the inputs that the original model gives it. With an end-to-end phase also "(model output)":
            the same ratio for what the swapped model returns.
        curve: every evaluation, in order.
        steps: steps of all phases together, including those before a resumption.
        stopped_early: phases that ended before their steps, because the held-out error no longer fell.
    """

    before: dict[str, float]
    after: dict[str, float]
    curve: list[DistillPoint] = field(default_factory=list)
    steps: int = 0
    stopped_early: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len("module"), *map(len, self.before))
        lines = [f"distilled {len(self.before)} outputs in {self.steps} steps"]
        lines += [f"{'module'.ljust(width)}  before   after", f"{'-' * width}  ------  ------"]
        lines += [f"{name.ljust(width)}  {error:.4f}  {self.after[name]:.4f}" for name, error in self.before.items()]
        lines += [f"{phase}: stopped early, the held-out error no longer fell" for phase in self.stopped_early]
        return "\n".join(lines)
