"""Train the codes of swapped attention, and optionally its projections, towards the original attention."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable

from torch import nn

from longvq_layers import _checks as check
from longvq_layers.replace.distill import checkpoint as checkpoints
from longvq_layers.replace.distill.report import END_TO_END, LAYERS, DistillPoint, DistillReport
from longvq_layers.replace.distill.setup import NAME, prepared, students_of
from longvq_layers.replace.distill.training import Distillation, DistillSettings
from longvq_layers.replace.model_inputs import ModelInputs, check_inputs, read_inputs


def distill_attention(
    model: nn.Module,
    data: Iterable[ModelInputs],
    *,
    steps: int = 200,
    lr: float = 0.01,
    projections: bool = False,
    end_to_end: int = 0,
    held_out: float = 0.1,
    evaluate_every: int = 20,
    patience: int = 5,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[DistillPoint], object] | None = None,
) -> DistillReport:
    """Train the codebooks of a model after `replace_attention`, so that its attention comes closer to the original.

        phase "layers":       mean over modules of ‖swapped − original‖² / ‖original‖², attention outputs, with the
                              inputs that the original model gives to each module
        phase "end to end":   the same ratio for what the model returns, with all modules swapped against none, plus the
                              mean over modules of the ratio of their outputs

    In causal attention, the codewords, their spread and its gain are trained. In bidirectional attention the codewords
    are means of the sequence's own keys. So only the gain is trained, and ``projections=True`` helps more. Everything
    else in the model stays, including modes and gradients. At the end the model has the values that were best on the
    held-out batches. If anything raises, the model is as it was before. `restore_attention` restores the original
    projections too, bit by bit.

    Args:
        model: a model with replaced attention (``local_keys="exact"``), or one that contains it.
        data: model inputs, as `calibration` of `replace_attention`; one batch a step, in an order that `seed` decides.
        steps: of the phase "layers", default 200; 0 leaves the phase out.
        lr: size of the first steps relative to the root mean square of each trained tensor (Adam), default 0.01; it
            falls to 0 along a cosine. Projections get a tenth of it.
        projections: True also trains all parameters of the attention modules themselves. Default False.
        end_to_end: steps of the phase "end to end", default 0.
        held_out: share of the batches that only measure errors: the last ones, at least one batch. Default 0.1.
        evaluate_every: steps between evaluations on the held-out batches, default 20.
        patience: evaluations without a new best after which a phase ends, default 5.
        seed: of the order, default 0.
        checkpoint: file to which everything is written at every evaluation. If it exists, the run continues from it and
            gives the same curve as a run that was not interrupted. Default none.
        progress: called with every `DistillPoint`; ``progress=print`` shows them. Default none.

    Returns:
        A report; ``print(report)`` shows the errors before and after.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, no replaced attention, fewer than two
            batches, a checkpoint of another run or one that can't be read or written.
        NotImplementedError: ``local_keys="quantized"``.

    Example:
        >>> import torch
        >>> from longvq_layers import replace_attention
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
        >>> data = [torch.randn(2, 100, 32) for _ in range(4)]
        >>> _ = replace_attention(layer, num_codes=16, window=8, calibration=data)
        >>> report = distill_attention(layer, data, steps=20, evaluate_every=5, projections=True)
        >>> report.after["self_attn"] < report.before["self_attn"]
        True

    Source: layerwise distillation of attention as in Hedgehog (arXiv 2402.04347); gradients of codewords are this
    library's.
    """
    check.integer(NAME, "steps", steps, 0)
    check.integer(NAME, "end_to_end", end_to_end, 0)
    check.integer(NAME, "evaluate_every", evaluate_every, 1)
    check.integer(NAME, "patience", patience, 1)
    check.integer(NAME, "seed", seed, 0)
    check.flags(NAME, projections=projections)
    _check_between("lr", lr, math.inf)
    _check_between("held_out", held_out, 1.0)
    check.function(NAME, "progress", progress)
    path = checkpoints.checked_path(checkpoint)
    students = students_of(model)
    check_inputs(NAME, "data", data)
    batches = read_inputs(NAME, "data", data)
    last = max(1, round(held_out * len(batches)))
    if len(batches) <= last:
        raise ValueError(
            f"{NAME}: data must have at least {last + 1} batches, {last} of them held out, got {len(batches)}"
        )
    settings = DistillSettings(
        phases={phase: count for phase, count in ((LAYERS, steps), (END_TO_END, end_to_end)) if count},
        lr=float(lr),
        projections=projections,
        seed=seed,
        patience=patience,
        evaluate_every=evaluate_every,
        batches=len(batches),
        held_out=last,
    )
    with prepared(model, students, projections) as ready:
        if path is not None:
            with ready.before.undone():  # the original weights, which every distillation of this model starts from
                fixed = [*model.parameters(), *(student.to_metric for student in ready.compared.students.values())]
                settings = dataclasses.replace(
                    settings, data=checkpoints.digest(batches), model=checkpoints.fingerprint(fixed)
                )
        return Distillation(ready, batches[:-last], batches[-last:], settings, path, progress).run()


def _check_between(name: str, value: float, most: float) -> None:
    check.number(NAME, name, value)
    if not 0 < value < most:
        raise ValueError(f"{NAME}: {name} must be more than 0 and less than {most:g}, got {value}")
