"""ListOps: the value of a nested expression over digits, as in the Long Range Arena."""

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.tasks.base import Batch, Task
from longvq_layers.tasks.listops_trees import Forest, evaluate, grow, layout

OPERATORS = ("MIN", "MAX", "MED", "SM")
TOKENS = ("<pad>", *map(str, range(10)), *(f"[{name}" for name in OPERATORS), "X")  # X closes a bracket
PAD, FIRST_DIGIT, FIRST_OPERATOR, CLOSE = 0, 1, 11, 15

_TREES_AT_ONCE = 512
_MOST_ROUNDS = 500  # without a tree of the right length; then it is given up


class ListOps(Task):
    """Give the value, a digit, of an expression such as `[MAX 4 3 [MIN 2 3 X 1 0 [MED 1 5 8 9 2 X X`.

    Trees are drawn as in the Long Range Arena. A node at a depth below `max_depth` is an operator with probability 1/4,
    otherwise a digit; nodes at `max_depth` are digits. An operator is MIN, MAX, MED or SM (sum modulo 10) with
    2 … `max_args` arguments. All choices are uniform. The median of an even number of arguments is the mean of the
    middle two, rounded down. Only trees with more than `min_length` and less than `max_length` tokens are used. Tokens
    are digits, an operator with its opening bracket, and the closing bracket (X).

    Args:
        min_length, max_length: exclusive bounds of the number of tokens, default 500 and 2000.
        max_depth: depth of the deepest digits, where the outermost operator has depth 1, default 10.
        max_args: most arguments of an operator, default 10.

    Raises:
        ValueError, TypeError: options out of range, or no expression can have such a length.

    Example:
        >>> task = ListOps(min_length=5, max_length=20, max_depth=3, max_args=4)
        >>> task.batch("train", 0, 2).targets.shape
        torch.Size([2])

    Source: Nangia & Bowman 2018 (arXiv 1804.06028); Tay et al. 2020 (Long Range Arena, arXiv 2011.04006) with its
    public generator.
    """

    name = "listops"
    kind = "classify"
    num_inputs = len(TOKENS)
    num_outputs = 10
    random_accuracy = 0.1

    def __init__(
        self, *, min_length: int = 500, max_length: int = 2000, max_depth: int = 10, max_args: int = 10
    ) -> None:
        check.positive(self.name, min_length=min_length, max_length=max_length, max_depth=max_depth)
        check.integer(self.name, "max_args", max_args, 2)
        longest = 1
        for _ in range(max_depth - 1):
            longest = min(2 + max_args * longest, max_length)
        if not min_length < min(longest, max_length - 1):
            raise ValueError(
                f"{self.name}: min_length must be below the longest expression and max_length - 1, got min_length "
                f"{min_length}, max_length {max_length}, max_depth {max_depth}, max_args {max_args}"
            )
        self.min_length, self.max_length, self.max_depth, self.max_args = min_length, max_length, max_depth, max_args
        self.length = max_length - 1

    def _draw(self, split: str, batch_size: int, generator: torch.Generator) -> Batch:
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        count = rounds = 0
        while count < batch_size:
            forest = grow(_TREES_AT_ONCE, self.min_length, self.max_length, self.max_depth, self.max_args, generator)
            rounds += 1
            if forest.count:
                found.append(render(forest, generator))
                count += forest.count
            elif not found and rounds == _MOST_ROUNDS:
                raise ValueError(
                    f"{self.name}: min_length and max_length must leave room for random expressions, got "
                    f"{self.min_length} and {self.max_length}, which none of {rounds * _TREES_AT_ONCE} expressions "
                    "met; widen them, or raise max_depth or max_args"
                )
        lengths = torch.cat([part[1] for part in found])[:batch_size]
        width = int(lengths.max())
        tokens = torch.cat([_as_wide(part[0], width) for part in found])[:batch_size]
        mask = torch.arange(width) >= lengths[:, None]
        return Batch(tokens, torch.cat([part[2] for part in found])[:batch_size], mask)


class ListOpsShort(ListOps):
    """`ListOps` that a small model learns in minutes: 31 to 119 tokens, depth 5, at most 5 arguments.

    The options are those of `ListOps`.
    """

    name = "listops-short"

    def __init__(self, *, min_length: int = 30, max_length: int = 120, max_depth: int = 5, max_args: int = 5) -> None:
        super().__init__(min_length=min_length, max_length=max_length, max_depth=max_depth, max_args=max_args)


def tokenize(source: str) -> list[int]:
    """Token numbers of an expression, with or without the parentheses of the Long Range Arena's binary trees.

    Parentheses are dropped and "]" is X, as in the Long Range Arena's input pipeline.

    Raises:
        ValueError: an unknown token.
    """
    words = source.replace("(", " ").replace(")", " ").replace("]", "X").split()
    try:
        return [_NUMBERS[word] for word in words]
    except KeyError as error:
        raise ValueError(f"listops: tokens must be of {', '.join(TOKENS[1:])}, got {error.args[0]!r}") from None


def render(forest: Forest, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw digits and operators; returns tokens (T, L), lengths (T,) and values (T,) of the trees."""
    symbols = []  # a digit or the number of an operator for each node of a level
    for arity in forest.arity:
        digit = torch.randint(10, arity.shape, generator=generator)
        operator = torch.randint(len(OPERATORS), arity.shape, generator=generator)
        symbols.append(torch.where(arity > 0, operator, digit))
    lengths, places = layout(forest)
    tokens = torch.full((forest.count, int(lengths.max())), PAD, dtype=torch.int64)
    for tree, arity, symbol, (start, end) in zip(forest.tree, forest.arity, symbols, places, strict=True):
        inner = arity > 0
        tokens[tree, start] = symbol + torch.where(inner, FIRST_OPERATOR, FIRST_DIGIT)
        tokens[tree[inner], end[inner]] = CLOSE
    return tokens, lengths, evaluate(forest, symbols)


def _as_wide(tokens: Tensor, width: int) -> Tensor:
    """Padded or cut to `width`; rows that are longer are not used."""
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=PAD)


_NUMBERS = {token: number for number, token in enumerate(TOKENS) if number != PAD}
