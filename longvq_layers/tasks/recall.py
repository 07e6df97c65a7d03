"""Multi-query associative recall: give the value that followed each key."""

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.tasks.base import IGNORED, Batch, Task

FILLS = ("unrelated", "any", "zero")


class MQAR(Task):
    """`pairs` keys, each followed by its value; then every key once more, where the target is its value.

        k₁ v₁ k₂ v₂ … | · · k₂ · · · k₁ …     targets: v₂ at the second k₂, v₁ at the second k₁, -100 elsewhere

    Keys are distinct tokens of 1 … vocab/2 - 1, values distinct tokens of vocab/2 … vocab - 1. After the pairs there
    are ⌊(length - 2 pairs)/2⌋ slots of two tokens. A query is the first token of its slot; slots are drawn without
    replacement with probability ∝ (1 + slot)^(power - 1).

    Args:
        length: of the sequence, default 256 (Zoology: 64).
        pairs: number of pairs and of queries, default 16 (Zoology: 4); at most length/4 and vocab/2 - 1.
        vocab: number of tokens, default 512 (Zoology: 8192).
        power: of the power law of the gaps, default 0.01 as in Zoology; 1 is uniform.
        fill: all other tokens after the pairs. "unrelated" (default): random tokens, but not the example's keys. "any":
            random tokens of the whole vocabulary, as in Zoology; keys among them have no target. "zero": token 0.

    Raises:
        ValueError, TypeError: options out of range.

    Example:
        >>> MQAR(length=64, pairs=4).batch("train", 0, 2).inputs.shape
        torch.Size([2, 64])

    Source: Arora et al. 2023 (Zoology, arXiv 2312.04927), section 4 and its public generator.
    """

    name = "mqar"
    kind = "label"

    def __init__(
        self, *, length: int = 256, pairs: int = 16, vocab: int = 512, power: float = 0.01, fill: str = "unrelated"
    ) -> None:
        check.positive(self.name, length=length, pairs=pairs, vocab=vocab)
        check.one_of(self.name, "fill", fill, FILLS)
        if 4 * pairs > length or pairs > vocab // 2 - 1:
            raise ValueError(
                f"mqar: pairs must be at most length/4 and vocab/2 - 1, got pairs {pairs}, length {length}, vocab "
                f"{vocab}"
            )
        check.number(self.name, "power", power)
        if not 0 < power <= 1:
            raise ValueError(f"mqar: power must be above 0 and at most 1, got {power}")
        self.length, self.pairs, self.power, self.fill = length, pairs, power, fill
        self.num_inputs = self.num_outputs = vocab
        self.random_accuracy = 1 / (vocab - vocab // 2)

    def _draw(self, split: str, batch_size: int, generator: torch.Generator) -> Batch:
        vocab, pairs, half = self.num_outputs, self.pairs, self.num_outputs // 2
        keys = 1 + _distinct(batch_size, half - 1, pairs, generator)
        values = half + _distinct(batch_size, vocab - half, pairs, generator)
        slots = (self.length - 2 * pairs) // 2
        weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.power - 1)
        asked = torch.multinomial(weights.expand(batch_size, -1), pairs, generator=generator)
        positions = 2 * pairs + 2 * asked

        inputs = self._filling(keys, generator)
        inputs[:, 0 : 2 * pairs : 2] = keys
        inputs[:, 1 : 2 * pairs : 2] = values
        inputs.scatter_(1, positions, keys)
        targets = torch.full_like(inputs, IGNORED).scatter_(1, positions, values)
        return Batch(inputs, targets)

    def _filling(self, keys: Tensor, generator: torch.Generator) -> Tensor:
        shape = (len(keys), self.length)
        if self.fill == "zero":
            return torch.zeros(shape, dtype=torch.int64)
        if self.fill == "any":
            return torch.randint(self.num_outputs, shape, generator=generator)
        # Draw n and take the n-th token that is not a key: add 1 for each key up to the token, in ascending order.
        tokens = torch.randint(self.num_outputs - self.pairs, shape, generator=generator)
        for key in keys.sort(dim=1).values.T:
            tokens += tokens >= key[:, None]
        return tokens


def _distinct(rows: int, high: int, count: int, generator: torch.Generator) -> Tensor:
    """(rows, count) random numbers below `high`, distinct within a row."""
    return torch.rand(rows, high, generator=generator).topk(count, dim=1).indices
