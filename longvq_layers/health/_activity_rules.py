"""Findings about what a monitor saw: entropy, gates, the commitment loss; and gates whose bias alone shuts them."""

import math
from collections.abc import Iterator

from torch import nn

from longvq_layers.health import _parts, _text
from longvq_layers.health.finding import Finding
from longvq_layers.health.monitor import Monitor
from longvq_layers.layers.attention.codebook_attention import CodebookAttention


def entropy_findings(model: nn.Module, monitor: Monitor, limits: dict[str, float]) -> Iterator[Finding]:
    for name, reading in monitor.entropy.items():
        if reading.calls < limits["entropy_calls"]:
            continue
        high = [head for head, value in enumerate(reading.mean) if value >= limits["entropy"]]
        if high:
            yield _high_entropy(name, model.get_submodule(name), reading.mean, high)


def gate_findings(model: nn.Module, monitor: Monitor | None, limits: dict[str, float]) -> Iterator[Finding]:
    output_gates = monitor.output_gates if monitor else {}
    attention_gates = monitor.attention_gates if monitor else {}
    for name, _, layer, is_output, columns in _parts.gates(model):
        reading = (output_gates if is_output else attention_gates).get(name)
        mean = reading.mean[0] if reading and reading.calls else math.nan
        if not math.isnan(mean):
            if is_output and mean <= limits["gate_closed"]:
                seen = f"G_o is {_text.number(mean)} on average, below 0.05 for {_text.percent(reading.mean[1])} of it"
                yield _closed(name, seen)
            elif is_output and mean >= limits["gate_open"]:
                yield _open(
                    name, f"G_o is {mean:.4f} on average, above 0.95 for {_text.percent(reading.mean[2])} of it"
                )
            elif not is_output and mean <= limits["attention_gate"]:
                yield _attention_closed(name, f"|G_a| is {_text.number(mean)} on average")
        elif layer.bias is not None and (bias := float(layer.bias[columns].float().median())) <= limits["gate_bias"]:
            seen = f"its bias is {_text.number(bias)} (median)"
            yield _closed(name, seen) if is_output else _attention_closed(name, seen)


def commitment_findings(monitor: Monitor, limits: dict[str, float]) -> Iterator[Finding]:
    ratio = monitor.commitment.average
    if ratio < limits["commitment_ratio"] or math.isnan(ratio):
        return
    attentions = [(n, m) for n, m in monitor.model.named_modules() if isinstance(m, CodebookAttention) and m.commitment]
    names = ", ".join(_text.module(name) for name, _ in attentions[:3]) + (" and more" if len(attentions) > 3 else "")
    beta = max((attention.commitment for _, attention in attentions), default=0.0)
    yield Finding(
        "warning",
        "commitment_dominates",
        names,
        f"the commitment loss is {_text.number(ratio)} times the task's loss",
        "keys are drawn to their codes instead of to where queries need them",
        f"commitment={_text.number(beta * 0.01 / ratio)} instead of {_text.number(beta)}, which is a hundredth of the "
        "task's loss; if it keeps growing, a lower lr for k_proj",
    )


def _high_entropy(name: str, attention: nn.Module, means: tuple[float, ...], high: list[int]) -> Finding:
    book = getattr(attention, "codebook", None)
    if book is None:
        codes = "an attention over the keys themselves"
    else:
        error = _text.number(float(book.quantization_error().nan_to_num(0).max()))
        codes = f"num_codes={book.num_codes}, quantization_error {error}"
    heads = "" if len(means) == 1 else f" in {len(high)} of {len(means)} heads"
    return Finding(
        "warning",
        "entropy_high",
        name,
        f"attention is uniform{heads}: entropy {max(means):.4f} of 1 (window={attention.window}, {codes})",
        "a uniform attention is a mean over the sequence: the codebook is too small or badly trained, or the keys say "
        "nothing",
        "more num_codes if the codes miss much of the keys, a larger window for local structure, a higher lr for "
        'q_proj and k_proj, key_grad="cluster", activation="softmax" instead of "laplace", fewer heads if only '
        "some are uniform",
    )


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
