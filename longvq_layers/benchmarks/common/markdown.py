"""Lines of Markdown tables."""

from collections.abc import Iterable


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def print_table(head: str, lines: Iterable[Iterable[object]]) -> None:
    """Print a table and an empty line.

    Args:
        head: the two lines of the heading.
        lines: the cells of each line.
    """
    print(head)
    for cells in lines:
        print(line(*cells))
    print()
