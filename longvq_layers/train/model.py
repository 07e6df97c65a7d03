"""The model of a run, with about the number of parameters that the settings ask for."""

from typing import Any

from torch import nn

from longvq_layers.models import SequenceClassifier, SequenceEncoder, SequenceLM
from longvq_layers.tasks import Task
from longvq_layers.train.settings import TrainSettings


def build(settings: TrainSettings, task: Task) -> nn.Module:
    """A classifier for tasks of kind "classify", else a model with an output at every position."""
    if task.rows_per_target != 1:
        raise ValueError(
            f"train: task must have one row for each answer, got {task.name!r} with {task.rows_per_target}; choose "
            "another layout in task_options"
        )
    options = dict(settings.block_options)
    if settings.parameters is not None:
        options["d_ff"] = _d_ff(settings, task, settings.parameters)
    return _make(settings, task, options)


def count(model: nn.Module) -> int:
    """Number of parameters, without the codebooks, which are buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


def _make(settings: TrainSettings, task: Task, options: dict[str, Any], device: str | None = None) -> nn.Module:
    encoder = SequenceEncoder(
        num_inputs=task.num_inputs,
        input_dim=task.input_dim,
        d_model=settings.d_model,
        depth=settings.depth,
        block=settings.block,
        causal=settings.causal or task.causal,
        dropout=settings.dropout,
        gradient_checkpointing=settings.gradient_checkpointing,
        block_options=options,
        device=device,
    )
    return (SequenceClassifier if task.kind == "classify" else SequenceLM)(encoder, task.num_outputs)


def _d_ff(settings: TrainSettings, task: Task, parameters: int) -> int:
    """The hidden width of the feed-forward blocks, on which the number of parameters depends linearly."""
    few, more = (count(_make(settings, task, {**settings.block_options, "d_ff": d}, "meta")) for d in (8, 16))
    d_ff = 8 + round((parameters - few) / (more - few) * 8)
    if d_ff < 1:
        raise ValueError(
            f"TrainSettings: parameters must be above {few - (more - few):,}, which {settings.depth} blocks "
            f"{settings.block!r} of d_model {settings.d_model} have without feed-forward blocks, got {parameters:,}"
        )
    return d_ff
