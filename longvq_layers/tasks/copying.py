"""Selective copying: repeat the data tokens in their order, leaving out the noise between them."""

import torch

from longvq_layers import _checks as check
from longvq_layers.tasks.base import IGNORED, Batch, Task


class SelectiveCopying(Task):
    """`memorise` data tokens at random places among noise, then as many places that ask for them in their order.

        · a · · b c · · ? ? ?      targets: -100 … -100 a b c

    Tokens: 0 is noise, 1 … vocab - 1 are data, `vocab` marks the places of the answers. The places of the data are any
    set of positions before the markers, all equally likely.

    Args:
        length: of the sequence with the answers, default 256 (Mamba: 4096).
        memorise: number of data tokens, default 16 as in Mamba; at most length/2.
        vocab: tokens with the noise, without the marker, default 16 as in Mamba; at least 3.

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
        check.positive(self.name, length=length, memorise=memorise, vocab=vocab)
        if 2 * memorise > length:
            raise ValueError(
                f"selective-copying: memorise must be at most length/2, got memorise {memorise}, length {length}"
            )
        if vocab < 3:
            raise ValueError(f"selective-copying: vocab must be at least 3, got {vocab}")
        self.length, self.memorise = length, memorise
        self.num_inputs, self.num_outputs = vocab + 1, vocab
        self.random_accuracy = 1 / (vocab - 1)

    def _draw(self, split: str, batch_size: int, generator: torch.Generator) -> Batch:
        places = self.length - self.memorise
        data = torch.randint(1, self.num_outputs, (batch_size, self.memorise), generator=generator)
        chosen = torch.rand(batch_size, places, generator=generator).topk(self.memorise, dim=1).indices.sort(dim=1)
        inputs = torch.zeros(batch_size, self.length, dtype=torch.int64).scatter_(1, chosen.values, data)
        inputs[:, places:] = self.num_inputs - 1
        targets = torch.full_like(inputs, IGNORED)
        targets[:, places:] = data
        return Batch(inputs, targets)
