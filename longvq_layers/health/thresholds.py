"""The thresholds of `diagnose`: the reading from which something is reported, and the reason for it."""

from collections.abc import Mapping
from typing import NamedTuple

from longvq_layers import _checks as check


class Threshold(NamedTuple):
    """A value and its reason."""

    value: float
    reason: str


THRESHOLDS: dict[str, Threshold] = {
    "codebook_calls": Threshold(
        110, "calls before dead codes and error are judged: until codes are re-seeded (after 100) half may be dead"
    ),
    "dead_share": Threshold(0.5, "half of the codes without a key in 10 calls: half as many would do the same"),
    "top_share": Threshold(0.9, "one code for nine keys of ten: far keys hardly differ for any query"),
    "quantization_error": Threshold(0.95, "1 is what a single code at the mean of the keys would reach"),
    "entropy": Threshold(0.999, "an untrained layer starts at 0.99 to 1; a trained head stays there only if unused"),
    "entropy_calls": Threshold(
        500, "recorded calls before entropy is judged: some heads stay near 1 for the first 100s"
    ),
    "gate_closed": Threshold(0.02, "the block changes its input by less than a fiftieth; 0.5 at the start"),
    "gate_open": Threshold(0.98, "less than a fiftieth of the input passes, and sigmoid has no slope left"),
    "gate_bias": Threshold(-10.0, "median bias; sigmoid(-10) = 5e-5, and the weights move a gate by 2 or 3 at most"),
    "attention_gate": Threshold(0.005, "a tenth of the size of G_a at the start; next to nothing of O is left"),
    "gradient_ratio": Threshold(1000.0, "times the median of the other blocks; up to 60 in healthy runs"),
    "commitment_ratio": Threshold(0.3, "of the task's loss; with commitment=1e-4 it is about a thousandth"),
    "step_size": Threshold(
        0.01, "times dt_min: the memory is 100 times longer than asked for, and inputs count 100 times less"
    ),
    "decay": Threshold(3.0, "per step, of the slowest mode: exp(-3) = 5 % is left after one position"),
    "channel_share": Threshold(0.1, "of the channels of an SSM with such a step or decay; single ones do no harm"),
    "amplification": Threshold(30.0, "RMS of a row times sqrt(inputs), 0.6 at the start: saturates what follows"),
}


def with_changes(changes: Mapping[str, float] | None) -> dict[str, float]:
    """The values of the table, with the changes of the caller."""
    values = {name: threshold.value for name, threshold in THRESHOLDS.items()}
    for name, value in (changes or {}).items():
        if name not in values:
            raise ValueError(f"diagnose: thresholds must be named {', '.join(values)}, got {name!r}")
        check.number("diagnose", f"thresholds[{name!r}]", value)
        values[name] = float(value)
    return values
