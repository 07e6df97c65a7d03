"""The suites: variants to compare, and all their settings but the seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from longvq_layers.train import TrainSettings

Options = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """Variants of one training run.

    Attributes:
        about: first line of the report.
        score: "accuracy" or "bits_per_byte", on the test set.
        common: keyword arguments of `TrainSettings` that all variants share.
        variants: label -> keyword arguments that differ.
    """

    about: str
    score: str
    common: Options
    variants: dict[str, Options] = field(default_factory=dict)

    def settings(self, label: str, seed: int) -> TrainSettings:
        """The settings of one run."""
        return TrainSettings(**{**self.common, **self.variants[label]}, seed=seed)

    @property
    def higher_is_better(self) -> bool:
        return self.score == "accuracy"


def _longvq(**options: object) -> Options:
    return {"block": "longvq", "block_options": options}


def _s4d(d_state: int) -> Options:
    return {"block": "s4d", "block_options": {"d_state": d_state}}


_TRANSFORMER: Options = {"block": "transformer"}


def _recall() -> Suite:
    ours: Options = {"num_codes": 128, "window": 4, "d_state": 16, "codebook_decay": 0.9}
    return Suite(
        "Associative recall, 8 pairs in 64 tokens, every key asked once; causal blocks",
        "accuracy",
        {
            "task": "mqar",
            "task_options": {"length": 64, "pairs": 8, "vocab": 64},
            "causal": True,
            "d_model": 64,
            "depth": 2,
            "parameters": 100_000,
            "steps": 3000,
            "batch_size": 32,
            "lr": 3e-3,
            "eval_every": 250,
            "eval_batches": 16,
        },
        {
            "longvq": _longvq(**ours),
            'longvq, key_grad="window"': _longvq(**ours, key_grad="window"),
            "longvq, codebook_decay=0.99": _longvq(**{**ours, "codebook_decay": 0.99}),
            "s4d": _s4d(16),
            "transformer": _TRANSFORMER,
        },
    )


def _copying() -> Suite:
    ours = {"num_codes": 128, "window": 4, "d_state": 32, "codebook_decay": 0.9}
    return Suite(
        "Selective copying, 8 data tokens among noise in 128; causal blocks",
        "accuracy",
        {
            "task": "selective-copying",
            "task_options": {"length": 128, "memorise": 8},
            "causal": True,
            "d_model": 64,
            "depth": 2,
            "parameters": 110_000,
            "steps": 5000,
            "batch_size": 32,
            "lr": 1e-3,
            "eval_every": 500,
            "eval_batches": 16,
        },
        {
            "longvq": _longvq(**ours),
            "s4d": _s4d(32),
            "transformer": _TRANSFORMER,
        },
    )


_LISTOPS: Options = {
    "task": "listops-short",
    "d_model": 64,
    "depth": 3,
    "parameters": 150_000,
    "steps": 4000,
    "batch_size": 32,
    "lr": 2e-3,
    "eval_every": 500,
    "eval_batches": 64,
}
_LISTOPS_LONGVQ: Options = {"num_codes": 64, "window": 16, "d_state": 16, "codebook_decay": 0.9}


def _listops() -> Suite:
    return Suite(
        "ListOps, short form",
        "accuracy",
        _LISTOPS,
        {
            "longvq": _longvq(**_LISTOPS_LONGVQ),
            "s4d": _s4d(16),
            "transformer": _TRANSFORMER,
        },
    )


def _ablation() -> Suite:
    changes: dict[str, Options] = {
        "longvq, 64 codes": {},
        "without VQ": {"num_codes": None},
        "gates from the input, not the SSM": {"ssm_gate": False},
        "without window bias": {"window_bias": False},
        "laplace attention": {"activation": "laplace"},
        "32 codes": {"num_codes": 32},
        "128 codes": {"num_codes": 128},
        "512 codes": {"num_codes": 512},
    }
    return Suite(
        "Parts of LongVQ on ListOps, short form",
        "accuracy",
        {**_LISTOPS, "steps": 1500},
        {label: _longvq(**{**_LISTOPS_LONGVQ, **change}) for label, change in changes.items()},
    )


def _digits() -> Suite:
    return Suite(
        "Handwritten digits as 64 pixels",
        "accuracy",
        {
            "task": "digits",
            "d_model": 64,
            "depth": 2,
            "parameters": 100_000,
            "dropout": 0.1,
            "steps": 1500,
            "batch_size": 32,
            "lr": 2e-3,
            "eval_every": 250,
            "eval_batches": 0,
        },
        {
            "longvq": _longvq(num_codes=64, window=16, d_state=32, codebook_decay=0.9),
            "s4d": _s4d(32),
            "transformer": _TRANSFORMER,
        },
    )


def _bytes(length: int, batch_size: int, limits: Options, about: str) -> Suite:
    # Learning rates: for each block, of 0.002, 0.004, 0.008, … the best on validation after 400 steps of one seed at
    # 1,024 bytes.
    ours = _longvq(num_codes=128, window=64, d_state=32, codebook_decay=0.9)
    return Suite(
        f"Next byte of Python source, {length:,} bytes at a time, {about}",
        "bits_per_byte",
        {
            "task": "bytes-lm",
            "task_options": {"length": length},
            "d_model": 128,
            "depth": 3,
            "parameters": 800_000,
            "batch_size": batch_size,
            "ssm_lr": 2e-3,
            "warmup": 50,
            "eval_batches": 65_536 // (length * batch_size),
            **limits,
        },
        {
            "longvq": {**ours, "lr": 16e-3},
            "s4d": {**_s4d(32), "lr": 16e-3},
            "transformer": {**_TRANSFORMER, "lr": 4e-3},
        },
    )


SUITES: Mapping[str, Callable[[], Suite]] = {
    "recall": _recall,
    "copying": _copying,
    "listops": _listops,
    "ablation": _ablation,
    "digits": _digits,
    "bytes-1024": lambda: _bytes(1024, 4, {"steps": 1000, "eval_every": 200}, "equal steps"),
    "bytes-4096": lambda: _bytes(
        4096, 1, {"steps": 100_000, "seconds": 180.0, "eval_every": 50}, "180 seconds of training"
    ),
}
