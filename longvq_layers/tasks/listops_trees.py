"""Many random trees at once, level by level: their shapes, the positions of their tokens, their values."""

from dataclasses import dataclass

import torch
from torch import Tensor

_OPERATOR_PROBABILITY = 0.25


@dataclass
class Forest:
    """Nodes of `count` trees by level. The next level holds the children, in the order of their parents.

    Attributes:
        count: number of trees.
        tree: for each level (n,), the tree of each node.
        arity: for each level (n,), the number of children, 0 for a digit.
    """

    count: int
    tree: list[Tensor]
    arity: list[Tensor]


def grow(
    trees: int, min_length: int, max_length: int, max_depth: int, max_args: int, generator: torch.Generator
) -> Forest:
    """Draws the shapes of `trees` random trees, and keeps trees whose length is strictly between the bounds."""
    tree = torch.arange(trees)
    lengths = torch.zeros(trees, dtype=torch.int64)
    levels: list[tuple[Tensor, Tensor]] = []
    for depth in range(1, max_depth + 1):
        arity = torch.randint(2, max_args + 1, tree.shape, generator=generator)
        operator = torch.rand(tree.shape, generator=generator) < _OPERATOR_PROBABILITY
        arity = torch.where(operator, arity, 0) if depth < max_depth else torch.zeros_like(arity)
        lengths.index_add_(0, tree, torch.where(arity > 0, 2, 1))  # an operator and its closing bracket
        levels.append((tree, arity))
        growing = torch.where(lengths[tree] < max_length, arity, 0)  # a tree that is too long already need not grow
        tree = tree.repeat_interleave(growing)
        if not len(tree):
            break
    accepted = (lengths > min_length) & (lengths < max_length)
    number = accepted.cumsum(0) - 1
    kept = [accepted[tree] for tree, _ in levels]
    return Forest(
        int(accepted.sum()),
        [number[tree[keep]] for (tree, _), keep in zip(levels, kept, strict=True) if keep.any()],
        [arity[keep] for (_, arity), keep in zip(levels, kept, strict=True) if keep.any()],
    )


def layout(forest: Forest) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Positions of the tokens.

    Returns:
        Lengths (T,) of the trees, and for each level the positions (n,), (n,) of the first and the last token of each
        node in its tree.
    """
    sizes = [torch.ones_like(forest.arity[-1])]
    for arity in reversed(forest.arity[:-1]):
        size = torch.where(arity > 0, 2, 1)
        sizes.append(size.index_add(0, _parents(arity), sizes[-1]))
    sizes.reverse()
    start = torch.zeros_like(sizes[0])
    places = [(start, start + sizes[0] - 1)]
    for arity, size in zip(forest.arity[:-1], sizes[1:], strict=True):
        parent = _parents(arity)
        before = size.cumsum(0) - size  # sizes of all nodes to the left in the level
        elder = before - before[_first_child(arity)[parent]]  # sizes of the siblings to the left
        start = start[parent] + 1 + elder
        places.append((start, start + size - 1))
    return sizes[0], places


def evaluate(forest: Forest, symbols: list[Tensor]) -> Tensor:
    """Values (T,) of the trees; `symbols` are digits, or 0 MIN, 1 MAX, 2 MED, 3 SM for nodes with children."""
    value = symbols[-1]
    for arity, symbol in zip(reversed(forest.arity[:-1]), reversed(symbols[:-1]), strict=True):
        parent, inner = _parents(arity), arity > 0
        total = torch.zeros_like(arity).index_add(0, parent, value)
        # Sorted among siblings: the k-th smallest child of a node is k after its first child.
        ordered = (parent * 10 + value).sort().values % 10
        first, count = _first_child(arity)[inner], arity[inner]
        smallest, largest = ordered[first], ordered[first + count - 1]
        median = (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) // 2
        results = torch.stack([smallest, largest, median, total[inner] % 10])
        value = symbol.clone()
        value[inner] = results.gather(0, symbol[inner][None])[0]
    return value


def _parents(arity: Tensor) -> Tensor:
    """For each node of the next level the index of its parent in this level."""
    return torch.arange(len(arity)).repeat_interleave(arity)


def _first_child(arity: Tensor) -> Tensor:
    return arity.cumsum(0) - arity
