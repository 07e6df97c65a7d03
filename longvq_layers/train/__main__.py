"""Train a small model on a task: `python -m longvq_layers.train mqar --block longvq --steps 2000`.

A killed run continues from its last checkpoint when the same command is given again.
"""

import argparse
import ast
from dataclasses import fields
from pathlib import Path

from longvq_layers import tasks
from longvq_layers.health import diagnose
from longvq_layers.models import BLOCKS
from longvq_layers.train.settings import TrainSettings
from longvq_layers.train.trainer import Trainer


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    args = vars(parser.parse_args(arguments))
    folder, plot, quiet = args.pop("out"), args.pop("plot"), args.pop("quiet")
    args["task_options"] = dict(args.pop("task_option") or [])
    args["block_options"] = dict(args.pop("block_option") or [])
    try:
        settings = TrainSettings(**args)
        folder = folder or Path("runs") / f"{settings.task}-{settings.block}-{settings.seed}"
        trainer = Trainer(settings, folder)
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    where = f"from step {trainer.step}" if trainer.step else f"seed {settings.seed}"
    print(f"{settings.task}: {settings.block}, {trainer.parameters:,} parameters, {settings.steps} steps, {where}")
    with _Progress(settings.steps, trainer.step, quiet) as progress:
        try:
            trainer.run(progress)
        except FloatingPointError:
            print(f"health: {diagnose(trainer.model)}")
            raise
    scores = trainer.test()
    print("test: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items()))
    print(f"health: {diagnose(trainer.model)}")
    print(f"Written: {folder / 'log.csv'}, {folder / 'checkpoint.pt'}")
    if plot:
        from longvq_layers.train.plot import draw

        draw(folder / "curve.png", [folder])
        print(f"Written: {folder / 'curve.png'}")


_WORDS = {"true": True, "false": False, "none": None}  # upper or lower case


class _Progress:
    """A progress bar if tqdm is installed, and a line for every evaluation."""

    def __init__(self, steps: int, done: int, quiet: bool) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            quiet = True
        self._bar = None if quiet else tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, row: dict[str, float]) -> None:
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix(loss=f"{row['train_loss']:.3f}", refresh=False)
        if "val_loss" in row:
            line = f"step {row['step']:6}, {row['seconds']:6.0f} s, loss {row['train_loss']:.4f}, "
            line += f"val loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.4f}"
            if "val_bits_per_byte" in row:
                line += f", bits per byte {row['val_bits_per_byte']:.4f}"
            print(line, flush=True) if self._bar is None else self._bar.write(line)


def _parser() -> argparse.ArgumentParser:
    # Defaults are those of TrainSettings.
    parser = argparse.ArgumentParser(
        prog="python -m longvq_layers.train",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = {field.name: field.default for field in fields(TrainSettings)}
    parser.add_argument("task", choices=tasks.NAMES)
    parser.add_argument("--block", choices=tuple(BLOCKS), default=default["block"])
    for flag, what in (("--task-option", "the task"), ("--block-option", "the blocks")):
        parser.add_argument(
            flag, action="append", type=_option, metavar="NAME=VALUE", help=f"an option of {what}; may be repeated"
        )
    for name, kind, text in (
        ("d_model", int, "width of the blocks"),
        ("depth", int, "number of blocks"),
        ("parameters", int, "size of the model; chooses the width of the feed-forward blocks"),
        ("dropout", float, "probability of dropping an element"),
        ("steps", int, "optimiser steps"),
        ("seconds", float, "end also after so many seconds of training"),
        ("batch_size", int, "sequences per step"),
        ("lr", float, "peak learning rate"),
        ("weight_decay", float, "decay of the weight matrices"),
        ("ssm_lr", float, "learning rate of the SSMs' poles and step sizes"),
        ("warmup", int, "steps of rising learning rate"),
        ("grad_clip", float, "largest norm of the gradient"),
        ("seed", int, "of weights and data"),
        ("eval_every", int, "steps between evaluations"),
        ("eval_batches", int, "batches of an evaluation, 0 = all of a finite set"),
        ("checkpoint_every", int, "steps between checkpoints, 0 = only at the end"),
        ("threads", int, "of PyTorch"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default[name], help=text)
    parser.add_argument(
        "--causal", action="store_true", help="let blocks see only the past, also where the task does not need it"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute blocks again during backward")
    parser.add_argument("--out", type=Path, help="folder of the run; default runs/TASK-BLOCK-SEED")
    parser.add_argument("--plot", action="store_true", help="draw the curve (needs matplotlib)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _option(text: str) -> tuple[str, object]:
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    if value.lower() in _WORDS:
        return name, _WORDS[value.lower()]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word: activation=laplace


if __name__ == "__main__":
    main()
