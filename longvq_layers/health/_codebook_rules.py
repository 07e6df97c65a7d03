"""Findings about codebooks, from their buffers."""

import math
from collections.abc import Iterator

from torch import nn

from longvq_layers.health import _text
from longvq_layers.health.codebooks import CodebookRow, codebook_statistics
from longvq_layers.health.finding import Finding
from longvq_layers.layers.codebook.codebook import Codebook

_WITHIN = 10  # calls without a key after which a code counts as dead


def codebook_findings(model: nn.Module, limits: dict[str, float]) -> Iterator[Finding]:
    rows: dict[str, list[CodebookRow]] = {}
    for row in codebook_statistics(model, within=_WITHIN):
        rows.setdefault(row.name, []).append(row)
    for name, heads in rows.items():
        book = model.get_submodule(name)
        if not bool(book.embedding.isfinite().all()):
            yield Finding(
                "error",
                "codebook_not_finite",
                name,
                f"{int((~book.embedding.isfinite()).any(-1).sum())} codes are NaN or infinite",
                "every key is compared with every code",
                "go back to a checkpoint from before training diverged, and lower lr or clip the gradients",
            )
        elif not heads[0].initialized:
            yield _untrained(name, book)
        else:
            yield from _frozen(name, book)
            for row in heads:
                yield from _head(row, book, limits)


def _untrained(name: str, book: Codebook) -> Finding:
    return Finding(
        "error",
        "codebook_untrained",
        name,
        "no training call has reached it: its codes are random" + (", and it is frozen" if book.frozen else ""),
        "keys outside the window are replaced by codes that have nothing to do with them",
        ("codebook.unfreeze(), then " if book.frozen else "")
        + "run a batch in model.train() mode, call codebook.initialize_(keys), or load a state_dict with codes",
    )


def _frozen(name: str, book: Codebook) -> Iterator[Finding]:
    if book.frozen and book.training:
        yield Finding(
            "note",
            "codebook_frozen",
            name,
            f"it is frozen while the model trains, since {int(book.steps)} steps of its own",
            "the keys move on and the codes stay; its readings stay too",
            "codebook.unfreeze(), unless k_proj is frozen as well",
        )


def _head(row: CodebookRow, book: Codebook, limits: dict[str, float]) -> Iterator[Finding]:
    head = f"head {row.head}: " if book.num_heads > 1 else ""
    if row.num_codes > 1 and row.top_share >= limits["top_share"]:
        yield Finding(
            "error",
            "codebook_collapsed",
            row.name,
            f"{head}one of {row.num_codes} codes takes {_text.percent(row.top_share)} of the keys "
            f"(perplexity {_text.number(row.perplexity)})",
            "far keys can't be told apart, attention outside the window is a plain mean of the values",
            "look at k_proj and at what it reads (the keys should differ between positions): a lower lr for it, no "
            'weight_decay on it, a smaller commitment, key_grad="cluster"; then codebook.reset_parameters()',
        )
        return
    if row.steps <= limits["codebook_calls"]:
        return
    if row.dead / row.num_codes >= limits["dead_share"]:
        fewer = 2 ** math.ceil(math.log2(max(2, row.num_codes - row.dead)))
        revive = "" if book.revive_after is not None else " revive_after=None: set it, to 100 for example;"
        yield Finding(
            "warning",
            "dead_codes",
            row.name,
            f"{head}{row.dead} of {row.num_codes} codes had no key in the last {_WITHIN} calls, one for "
            f"{row.longest_idle} (revive_after={book.revive_after})",
            "codes that nobody chooses cost time and memory and hold nothing",
            f"num_codes={fewer} instead of {row.num_codes};{revive} or longer sequences and larger batches, for there "
            "can't be more codes in use than different keys",
        )
    if row.quantization_error >= limits["quantization_error"]:
        yield Finding(
            "warning",
            "quantization_error",
            row.name,
            f"{head}codes miss {_text.number(row.quantization_error)} of the variance of the keys",
            "0 is exact, 1 is what a single code at the mean of the keys would reach: the codes carry nothing",
            f"codes that fit: codebook.initialize_(keys) or codebook.reset_parameters() if keys have moved away from "
            f"them, a lower lr for k_proj if they keep doing so; num_codes above {row.num_codes} or narrower heads if "
            'they never fitted; a larger window or local_keys="exact" to depend on them less',
        )
