"""Loss and score of a model on held-out data."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from longvq_layers.tasks import Batch, Task, bits_per_byte


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (B, C) or (B, L, C) over the targets that are not -100."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, split: str, batch_size: int, batches: int) -> dict[str, float]:
    """Loss in nats, accuracy, and for language models bits per byte.

    The model is evaluated in eval mode and then returned to its mode.

    Args:
        model: takes the inputs and the padding mask of a batch.
        task: gives the batches.
        split: "train", "val" or "test".
        batch_size: of the batches.
        batches: how many; 0 = all of a finite set.

    Raises:
        ValueError: all batches of an endless set.
    """
    training = model.training
    model.eval()
    nats, right, total = 0.0, 0, 0
    for batch in _batches(task, split, batch_size, batches):
        logits = model(batch.inputs, batch.key_padding_mask)
        scored = batch.targets != -100
        number = int(scored.sum())
        if number:
            nats += float(loss_of(logits, batch.targets)) * number
            right += int((logits.argmax(-1) == batch.targets)[scored].sum())
            total += number
    model.train(training)
    scores = {"loss": nats / max(total, 1), "accuracy": right / max(total, 1)}
    if task.kind == "lm":
        scores["bits_per_byte"] = bits_per_byte(scores["loss"])
    return scores


def _batches(task: Task, split: str, batch_size: int, batches: int) -> Iterator[Batch]:
    finite = task.size(split) is not None
    if batches == 0 and not finite:
        raise ValueError(f"evaluate: batches must be at least 1, because {task.name!r} is endless, got 0")
    if not finite:
        for step in range(batches):
            yield task.batch(split, step, batch_size)
        return
    for number, batch in enumerate(task.batches(split, batch_size)):
        if batches and number >= batches:
            return
        yield batch
