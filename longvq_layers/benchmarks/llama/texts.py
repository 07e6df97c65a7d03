"""Texts for the byte Llama: source of the standard library, and source that gives a key and asks for it again."""

import torch
from torch import Tensor

from longvq_layers.tasks.base import Batch, stream
from longvq_layers.tasks.python_source import BytesLM

KEYS, ASK = bytes(range(0x10, 0x20)), 0x0F  # control characters, which the source doesn't have


def drawn(length: int, count: int, step: int) -> Tensor:
    """(count, length + 1) bytes of training source, different at every step."""
    return _with_target(BytesLM(length=length).batch("train", step, count))


def windows(length: int, count: int, split: str = "val") -> Tensor:
    """(count, length + 1) bytes of source, spread over a split."""
    if split == "train":
        return drawn(length, count, 0)
    task = BytesLM(length=length)
    step = max(1, (task.size(split) or 0) // count)
    return torch.cat([_with_target(task.batch(split, number * step, 1)) for number in range(count)])


def _with_target(batch: Batch) -> Tensor:
    return torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)


def recall(length: int, count: int, split: str, seed: int, *, asked: int) -> Tensor:
    """(count, length + 1) bytes of source that give one of 16 keys near the front and ask for it `asked` times.

    The questions are spread evenly. The last one ends the text, followed by the key.
    """
    generator = stream("byte-llama-recall", split, length, seed)
    task = BytesLM(length=length)
    text = _with_target(task.batch(split, int(torch.randint(10_000, (), generator=generator)), count))
    for row in text:
        key = KEYS[int(torch.randint(len(KEYS), (), generator=generator))]
        given, question = (torch.tensor([*text, key, 10]) for text in (b"\nKEY = ", b"\nassert KEY == " + bytes([ASK])))
        start = int(torch.randint(length // 8, (), generator=generator))
        row[start : start + len(given)] = given
        for end in torch.linspace(start + len(given), len(row) + 1, asked + 1)[1:].int().tolist():
            row[end - len(question) : end] = question[: len(row) - end + len(question)]
    return text


def mixed(length: int, step: int) -> Tensor:
    """(8, length + 1) training bytes: four texts of source, four that ask for a key 1, 3, 6 and 12 times."""
    keys = [recall(length, 1, "train", 4 * step + i, asked=asked) for i, asked in enumerate((1, 3, 6, 12))]
    return torch.cat([drawn(length, 4, step), *keys])
