"""The base class of streaming states, with tensors, nested states, tuples, None and numbers as attributes."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from longvq_layers.ops._state import State


@dataclass(eq=False, repr=False)
class Inner(State):
    values: Tensor
    window: int


@dataclass(eq=False, repr=False)
class Outer(State):
    layers: tuple[State, ...]
    lengths: Tensor
    missing: Tensor | None = None


@pytest.fixture
def state():
    return Outer((Inner(torch.randn(3, 2, dtype=torch.complex64), 5), Inner(torch.randn(3), 6)), torch.arange(3))


def test_tensors_are_found_in_order(state):
    first, second = state.layers
    assert all(x is y for x, y in zip(state.tensors(), (first.values, second.values, state.lengths), strict=True))
    assert (state.batch, state.nbytes) == (3, 3 * 2 * 8 + 3 * 4 + 3 * 8)


def test_clones_share_nothing_and_keep_the_rest(state):
    copied = state.clone()
    assert type(copied) is Outer and copied.missing is None
    assert [type(inner) for inner in copied.layers] == [Inner, Inner]
    assert [inner.window for inner in copied.layers] == [5, 6]
    for new, old in zip(copied.tensors(), state.tensors(), strict=True):
        assert torch.equal(new, old) and new.data_ptr() != old.data_ptr()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_are_chosen_everywhere(state, dtype):
    rows = torch.tensor([2, 0, 2, 1], dtype=dtype)
    for new, old in zip(state.index_select(rows).tensors(), state.tensors(), strict=True):
        assert torch.equal(new, old[rows.long()])
    with pytest.raises(TypeError, match=r"^Outer\.index_select: rows must be int64 or int32, got torch\.float32"):
        state.index_select(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^Outer\.index_select: rows must have 1 dimensions"):
        state.index_select(torch.zeros(1, 1, dtype=dtype))


def test_moving_and_showing(state):
    moved = state.to("meta")
    assert all(x.device.type == "meta" for x in moved.tensors()) and moved.layers[1].window == 6
    assert all(x is y for x, y in zip(state.to("cpu").tensors(), state.tensors(), strict=True))
    assert repr(state.layers[0]) == "Inner(values=(3, 2), window=5)"
    inner = ", ".join(map(repr, state.layers))
    assert repr(state) == f"Outer(layers=({inner}), lengths=(3,), missing=None)"
