"""Findings about gates, from what a monitor saw them pass or, without a reading, from a bias that closes them."""

import math
from collections.abc import Iterator, Mapping

from torch import nn

from longvq_layers.health import _model_parts, _text
from longvq_layers.health._moving_average import Reading
from longvq_layers.health.finding import Finding
from longvq_layers.health.monitor import Monitor


def gate_findings(model: nn.Module, monitor: Monitor | None, limits: Mapping[str, float]) -> Iterator[Finding]:
    output_gates = monitor.output_gates if monitor else {}
    attention_gates = monitor.attention_gates if monitor else {}
    for name, _, layer, is_output, columns in _model_parts.gates(model):
        reading = (output_gates if is_output else attention_gates).get(name)
        if reading is not None and reading.calls and not math.isnan(reading.mean[0]):
            yield from _output_gate(name, reading, limits) if is_output else _attention_gate(name, reading, limits)
        elif layer.bias is not None and (bias := float(layer.bias[columns].float().median())) <= limits["gate_bias"]:
            seen = f"its bias is {_text.number(bias)} (median)"
            yield _closed(name, seen) if is_output else _attention_closed(name, seen)


def _output_gate(name: str, reading: Reading, limits: Mapping[str, float]) -> Iterator[Finding]:
    mean, closed, open_ = reading.mean
    if mean <= limits["gate_closed"]:
        yield _closed(name, f"G_o is {_text.number(mean)} on average, below 0.05 for {_text.percent(closed)} of it")
    elif mean >= limits["gate_open"]:
        yield _open(name, f"G_o is {mean:.4f} on average, above 0.95 for {_text.percent(open_)} of it")


def _attention_gate(name: str, reading: Reading, limits: Mapping[str, float]) -> Iterator[Finding]:
    mean = reading.mean[0]
    if mean <= limits["attention_gate"]:
        yield _attention_closed(name, f"|G_a| is {_text.number(mean)} on average")


def _closed(name: str, seen: str) -> Finding:
    return Finding(
        "error",
        "output_gate_closed",
        name,
        seen,
        "a block whose output gate is shut passes its input through, and learns nothing",
        f"bias of {name} back to 0 (nn.init.zeros_), a lower lr for the gate and no weight_decay on the rest of the "
        'block meanwhile, norm="pre"; a block that stays shut can go',
    )


def _open(name: str, seen: str) -> Finding:
    return Finding(
        "warning",
        "output_gate_open",
        name,
        seen,
        "nothing of the block's input passes, so there is no residual connection, and no slope to get it back",
        f"bias of {name} back to 0 (nn.init.zeros_), a lower lr for the gate, gradient clipping",
    )


def _attention_closed(name: str, seen: str) -> Finding:
    return Finding(
        "warning",
        "attention_gate_closed",
        name,
        seen,
        "next to nothing of the attention reaches the block's output: the SSM does all the work",
        f"bias of {name} back to 0 (nn.init.zeros_), a lower lr for the gate; if it closes again, see whether the "
        "attention is of use (entropy, quantisation error)",
    )
