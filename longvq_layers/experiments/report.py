"""The table and the picture of a suite."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longvq_layers.experiments.runner import folder_of
from longvq_layers.experiments.suites import Suite
from longvq_layers.train.log import column, read


@dataclass(frozen=True)
class Line:
    """The results of one variant over all seeds."""

    label: str
    parameters: int
    steps: int
    milliseconds: float  # of a training step
    scores: tuple[float, ...]  # on the test set, one for each seed

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)


def collect(suite: Suite, out: Path, seeds: Sequence[int], times: Mapping[str, float]) -> list[Line]:
    """The results of the finished runs, with `times`, the seconds of a step of each variant."""
    lines = []
    for label in suite.variants:
        files = [folder_of(out, label, seed) / "result.json" for seed in seeds]
        results = [json.loads(file.read_text()) for file in files]
        lines.append(
            Line(
                label,
                results[0]["parameters"],
                results[0]["steps"],
                1e3 * times[label],
                tuple(result["test"][suite.score] for result in results),
            )
        )
    return lines


def markdown(suite: Suite, lines: Sequence[Line]) -> str:
    """The table; the best mean comes first."""
    score = suite.score.replace("_", " ")
    rows = [
        f"| | parameters | steps | ms a step | {score}, mean | each seed |",
        "|:---|---:|---:|---:|---:|:---|",
    ]
    for line in sorted(lines, key=lambda line: line.mean, reverse=suite.higher_is_better):
        each = ", ".join(f"{score:.4f}" for score in line.scores)
        rows.append(
            f"| {line.label} | {line.parameters:,} | {line.steps:,} | {line.milliseconds:.1f} | {line.mean:.4f} "
            f"| {each} |"
        )
    return "\n".join(rows)


def draw(suite: Suite, out: Path, seeds: Sequence[int], path: Path) -> None:
    """Validation curves over steps: the mean of the seeds as a line, their range shaded."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    with pyplot.rc_context({"axes.spines.right": False, "axes.spines.top": False}):
        figure, axes = pyplot.subplots(figsize=(7, 4.2))
        for label in suite.variants:
            curves = [read(folder_of(out, label, seed) / "log.csv") for seed in seeds]
            points = min(map(len, curves))
            values = [column(curve[:points], f"val_{suite.score}") for curve in curves]
            steps = column(curves[0][:points], "step")
            (line,) = axes.plot(steps, [statistics.fmean(at) for at in zip(*values, strict=True)], label=label)
            low, high = (list(map(pick, zip(*values, strict=True))) for pick in (min, max))
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel="step", ylabel=f"validation {suite.score.replace('_', ' ')}")
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
