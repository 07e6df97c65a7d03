"""ListOps against an independent evaluator and generator."""

import random
import statistics
from collections import Counter

import pytest
import torch

from longvq_layers.tasks.listops import TOKENS, ListOps, ListOpsShort, tokenize

OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def parse(words: list[str]):
    """The tree as (operator, [arguments]) and digits, read with a stack of open brackets."""
    stack = [("", [])]
    for word in words:
        if word == "X":
            done = stack.pop()
            stack[-1][1].append(done)
        elif word.startswith("["):
            stack.append((word, []))
        else:
            stack[-1][1].append(int(word))
    assert len(stack) == 1 and len(stack[0][1]) == 1
    return stack[0][1][0]


def solve(tree) -> int:
    return tree if isinstance(tree, int) else OPERATORS[tree[0]]([solve(argument) for argument in tree[1]])


def depth(tree) -> int:
    return 1 if isinstance(tree, int) else 1 + max(depth(argument) for argument in tree[1])


def nodes(tree):
    if not isinstance(tree, int):
        yield tree
        for argument in tree[1]:
            yield from nodes(argument)


def expressions(task, count: int):
    """Words and target of examples."""
    for batch in task.batches("train", 256, examples=count):
        lengths = (~batch.key_padding_mask).sum(1).tolist()
        for row, length, target in zip(batch.inputs.tolist(), lengths, batch.targets.tolist(), strict=True):
            yield [TOKENS[token] for token in row[:length]], target


def drawn(level: int, max_depth: int, max_args: int, rng: random.Random):
    """A tree as the Long Range Arena's paper and generator say, one node at a time."""
    if level == max_depth or rng.random() >= 0.25:
        return rng.randrange(10)
    arguments = [drawn(level + 1, max_depth, max_args, rng) for _ in range(rng.randint(2, max_args))]
    return (rng.choice(list(OPERATORS)), arguments)


def length(tree) -> int:
    return 1 if isinstance(tree, int) else 2 + sum(map(length, tree[1]))


@pytest.mark.parametrize(
    ("task", "count"),
    [
        (ListOpsShort(), 2048),
        (ListOps(), 256),
        (ListOps(min_length=3, max_length=40, max_depth=3, max_args=2), 512),
        (ListOps(min_length=5, max_length=9, max_depth=5, max_args=9), 512),
    ],
    ids=str,
)
def test_expressions_are_well_formed_and_the_target_is_their_value(task, count):
    for words, target in expressions(task, count):
        tree = parse(words)
        assert solve(tree) == target
        assert task.min_length < len(words) < task.max_length and len(words) <= task.length
        assert depth(tree) <= task.max_depth
        assert all(2 <= len(arguments) <= task.max_args for _, arguments in nodes(tree))


def test_shapes_have_the_distribution_of_a_generator_by_nodes():
    rng = random.Random(0)
    theirs = []
    while len(theirs) < 4000:
        tree = drawn(1, 5, 6, rng)
        if 8 < length(tree) < 60:
            theirs.append(tree)
    ours = [parse(w) for w, _ in expressions(ListOps(min_length=8, max_length=60, max_depth=5, max_args=6), 4000)]
    for measure in (length, depth, solve, lambda tree: len(tree[1]), lambda tree: len(list(nodes(tree)))):
        a, b = [measure(tree) for tree in ours], [measure(tree) for tree in theirs]
        error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
        assert abs(statistics.mean(a) - statistics.mean(b)) < 4 * error
        assert statistics.stdev(a) == pytest.approx(statistics.stdev(b), rel=0.1)


def test_operators_and_digits_are_equally_likely():
    trees = [parse(words) for words, _ in expressions(ListOpsShort(), 2048)]
    operators = Counter(operator for tree in trees for operator, _ in nodes(tree))
    digits = Counter(a for tree in trees for _, arguments in nodes(tree) for a in arguments if isinstance(a, int))
    for counts, kinds in ((operators, 4), (digits, 10)):
        assert len(counts) == kinds
        for count in counts.values():
            assert count == pytest.approx(counts.total() / kinds, rel=0.1)


def test_class_balance_of_the_long_form_leans_to_the_ends():
    shares = ListOps().class_balance("train", 1024)
    assert shares.min() > 0.04 and shares.max() < 0.22 and set(shares.topk(2).indices.tolist()) == {0, 9}


def test_the_last_row_does_not_depend_on_the_width_of_the_others():
    batch = ListOpsShort().batch("val", 0, 8)
    assert not batch.key_padding_mask.all(0).any() and batch.key_padding_mask.any()


class TestTokenize:
    def test_parentheses_are_dropped_and_the_bracket_is_renamed(self):
        source = "( ( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 3 ) ] ) ) 1 ) ] )"
        words = [TOKENS[token] for token in tokenize(source)]
        assert words == ["[MAX", "4", "[MIN", "2", "3", "X", "1", "X"]
        assert tokenize("[MAX 4 [MIN 2 3 ] 1 ]") == tokenize(source)

    @pytest.mark.parametrize("source", ["[SUM 1 2 ]", "[MAX 10 2 ]", "<pad>"])
    def test_an_unknown_token_is_named(self, source):
        with pytest.raises(ValueError, match=r"tokens must be of 0, 1, .*, got "):
            tokenize(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": 0}, "min_length must be at least 1"),
        ({"max_args": 1}, "max_args must be at least 2"),
        ({"min_length": 10, "max_length": 11}, "min_length must be below the longest expression"),
        ({"max_depth": 2, "max_args": 3, "min_length": 5}, "min_length must be below the longest expression"),
        ({"max_depth": 1, "min_length": 1}, "min_length must be below the longest expression"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"listops: {message}"):
        ListOps(**options)


def test_rare_lengths_are_given_up():
    task = ListOps(min_length=1110, max_length=1113, max_depth=4, max_args=10)
    with pytest.raises(ValueError, match="which none of 256000 expressions met"):
        task.batch("train", 0, 1)


def test_one_tree_in_detail():
    from longvq_layers.tasks.listops_trees import Forest, evaluate, layout

    # [MED 7 [SM 8 9] 3 [MAX 1 2 0]] and the digit 6
    arity = [torch.tensor([4, 0]), torch.tensor([0, 2, 0, 3]), torch.tensor([0, 0, 0, 0, 0])]
    forest = Forest(2, [torch.tensor([0, 1]), torch.zeros(4, dtype=int), torch.zeros(5, dtype=int)], arity)
    symbols = [torch.tensor([2, 6]), torch.tensor([7, 3, 3, 1]), torch.tensor([8, 9, 1, 2, 0])]
    assert evaluate(forest, symbols).tolist() == [5, 6]  # of 7, 7, 3, 2: (3 + 7) / 2
    lengths, places = layout(forest)
    assert lengths.tolist() == [13, 1]
    assert [start.tolist() for start, _ in places] == [[0, 0], [1, 2, 6, 7], [3, 4, 8, 9, 10]]
    assert [end.tolist() for _, end in places] == [[12, 0], [1, 5, 6, 11], [3, 4, 8, 9, 10]]
