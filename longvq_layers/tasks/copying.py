"""Selective copying: repeat the data tokens in their order, without the noise between them."""

import torch

from longvq_layers import _checks as check
from longvq_layers.tasks.base import IGNORED, Batch, Task


class SelectiveCopying(Task):
    """`memorise` data tokens at random positions among noise, then as many positions that ask for them in their order.

        · a · · b c · · ? ? ?      targets: -100 … -100 a b c

    Tokens: 0 is noise, 1 … vocab - 1 are data, `vocab` marks the positions of the answers. All sets of positions before
    the markers are equally likely for the data.

    Args:
        length: of the sequence with the answers, default 256 (Mamba: 4096).
        memorise: number of data tokens, at most length/2, default 16 as in Mamba.
        vocab: number of tokens with the noise and without the marker, at least 3, default 16 as in Mamba.

    Raises:
        ValueError, TypeError: options out of range.

    Example:
        >>> SelectiveCopying(length=64).batch("val", 0, 2).targets[0, -16:].min() > 0
        tensor(True)

    Source: Gu & Dao 2023 (Mamba, arXiv 2312.00752), section 4.1.1 and appendix E.1, after Jing et al. 2019.
    """

    name = "selective-copying"
    kind = "label"

    def __init__(self, *, length: int = 256, memorise: int = 16, vocab: int = 16) -> None:
        check.positive(self.name, length=length, memorise=memorise)
        if 2 * memorise > length:
            raise ValueError(
                f"selective-copying: memorise must be at most length/2, got memorise {memorise}, length {length}"
            )
        check.integer(self.name, "vocab", vocab, 3)
        self.length, self.memorise = length, memorise
        self.num_inputs, self.num_outputs = vocab + 1, vocab
        self.random_accuracy = 1 / (vocab - 1)

    def _draw(self, split: str, batch_size: int, generator: torch.Generator) -> Batch:
        before = self.length - self.memorise
        data = torch.randint(1, self.num_outputs, (batch_size, self.memorise), generator=generator)
        chosen = torch.rand(batch_size, before, generator=generator).topk(self.memorise, dim=1).indices.sort(dim=1)
        inputs = torch.zeros(batch_size, self.length, dtype=torch.int64).scatter_(1, chosen.values, data)
        inputs[:, before:] = self.num_outputs  # the marker
        targets = torch.full_like(inputs, IGNORED)
        targets[:, before:] = data
        return Batch(inputs, targets)
