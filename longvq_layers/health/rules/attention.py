"""Findings about what a monitor saw of attention: its entropy and the commitment loss."""

import math
from collections.abc import Iterator, Mapping

from torch import nn

from longvq_layers.health import _text
from longvq_layers.health.finding import Finding
from longvq_layers.health.monitor import Monitor
from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.codebook.codebook import Codebook


def entropy_findings(model: nn.Module, monitor: Monitor, limits: Mapping[str, float]) -> Iterator[Finding]:
    for name, reading in monitor.entropy.items():
        if reading.calls < limits["entropy_calls"]:
            continue
        high = [head for head, value in enumerate(reading.mean) if value >= limits["entropy"]]
        if high:
            yield _high_entropy(name, model.get_submodule(name), reading.mean, high)


def commitment_findings(monitor: Monitor, limits: Mapping[str, float]) -> Iterator[Finding]:
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
    if isinstance(book, Codebook):
        error = _text.number(float(book.quantization_error().nan_to_num(0).max()))
        codes = f"num_codes={book.num_codes}, quantization_error {error}"
    else:
        codes = "an attention over the keys themselves"
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
