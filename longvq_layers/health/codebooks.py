"""What the codebooks of a model remember of their training, as a table."""

from dataclasses import dataclass

import torch
from torch import nn

from longvq_layers import _checks as check
from longvq_layers.health import _text
from longvq_layers.layers.codebook.codebook import Codebook


@dataclass(frozen=True)
class CodebookRow:
    """One head of one codebook.

    Attributes:
        name: of the `Codebook` in the model.
        head: of the codebook, from 0.
        num_codes: S.
        initialized: whether the codes were ever fitted to keys; otherwise they are random.
        frozen: whether learning is turned off.
        steps: training calls that it learned from.
        usage: share of the codes that a key chose, or that were re-seeded, in the last `within` calls.
        dead: number of the other codes.
        longest_idle: calls since the code that waits longest was last chosen, at most `steps`.
        perplexity: number of codes that equal shares would need for the same entropy, 1 to S.
        top_share: share of the keys that the most used code takes.
        quantization_error: 0 = every key is a code, 1 = no better than the mean; NaN before any key.
    """

    name: str
    head: int
    num_codes: int
    initialized: bool
    frozen: bool
    steps: int
    usage: float
    dead: int
    longest_idle: int
    perplexity: float
    top_share: float
    quantization_error: float


class CodebookTable(list[CodebookRow]):
    """A list of `CodebookRow`; `print` shows a table."""

    def __str__(self) -> str:
        header = ("codebook", "head", "codes", "steps", "usage", "dead", "idle", "perplexity", "top", "error", "state")
        return _text.table(header, [_cells(row) for row in self])


@torch.no_grad()
def codebook_statistics(model: nn.Module, *, within: int = 10) -> CodebookTable:
    """How well the codebooks of a model are used, from their buffers alone: no forward, and cheap.

    Args:
        model: any module.
        within: training calls without a key after which a code counts as dead, default 10.

    Returns:
        A list with one `CodebookRow` per codebook and head, in the order of the model; `print` shows a table.

    Raises:
        TypeError: `model` is no module, `within` no int.
        ValueError: `within` below 1, a codebook on the meta device, which has no numbers.

    Example:
        >>> import longvq_layers
        >>> layer = longvq_layers.VQAttention(32, 2, num_codes=16)
        >>> out = layer(torch.randn(2, 40, 32))
        >>> [(row.name, row.head, row.steps, row.dead) for row in codebook_statistics(layer)]
        [('attention.codebook', 0, 1, 0), ('attention.codebook', 1, 1, 0)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"codebook_statistics: model must be a torch.nn.Module, got {type(model).__name__}")
    check.positive("codebook_statistics", within=within)
    books = [(name, book) for name, book in model.named_modules() if isinstance(book, Codebook)]
    return CodebookTable(row for name, book in books for row in _rows(name, book, within))


def _rows(name: str, book: Codebook, within: int) -> list[CodebookRow]:
    if book.embedding.is_meta:
        raise ValueError(f"codebook_statistics: {name} must have numbers, got a codebook on the meta device")
    count = book.ema_count
    readings = torch.stack(
        [
            book.usage(within),
            (book.idle >= within).sum(-1),
            book.idle.amax(-1).clamp(max=book.steps),  # codes that never had a key start as idle for long
            book.perplexity(),
            count.amax(-1) / count.sum(-1),
            book.quantization_error(),
        ],
        dim=-1,
    )
    steps, initialized = int(book.steps), bool(book.initialized)
    return [
        CodebookRow(
            name,
            head,
            book.num_codes,
            initialized,
            book.frozen,
            steps,
            usage=usage,
            dead=int(dead),
            longest_idle=int(idle),
            perplexity=perplexity,
            top_share=top,
            quantization_error=error,
        )
        for head, (usage, dead, idle, perplexity, top, error) in enumerate(readings.tolist())
    ]


def _cells(row: CodebookRow) -> tuple[str, ...]:
    state = "frozen" if row.frozen else "learning"
    return (
        _text.module(row.name),
        str(row.head),
        str(row.num_codes),
        str(row.steps),
        _text.percent(row.usage),
        str(row.dead),
        str(row.longest_idle),
        _text.number(row.perplexity),
        _text.percent(row.top_share),
        _text.number(row.quantization_error),
        state if row.initialized else f"random, {state}",
    )
