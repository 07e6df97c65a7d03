"""The base class of the states of streaming calls."""

from collections.abc import Callable, Iterator
from dataclasses import Field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from longvq_layers import _checks as check

AnyState = TypeVar("AnyState", bound="State")


class State:
    """Base of dataclasses whose attributes are tensors (B, ...), other states, tuples of both, or plain values."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return self.tensors()[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of the tensors in bytes; it does not depend on the length."""
        return sum(x.nbytes for x in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the attributes; attributes that are None are left out."""
        return tuple(x for field in fields(self) for x in _tensors_of(getattr(self, field.name)))

    def clone(self: AnyState) -> AnyState:
        """A copy that shares no memory, for example to continue one sequence in two ways."""
        return self._map(Tensor.clone)

    def index_select(self: AnyState, rows: Tensor) -> AnyState:
        """A new state whose row i is a copy of row ``rows[i]``. Beam search leaves some rows out and repeats others.

        Args:
            rows: (N,) int64 or int32, in [0, B), on the device of the state.
        """
        name = f"{type(self).__name__}.index_select"
        check.tensor(name, "rows", rows, "N")
        if rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: rows must be int64 or int32, got {rows.dtype}")
        return self._map(lambda x: x.index_select(0, rows))

    def to(self: AnyState, device: torch.device | str) -> AnyState:
        """The state on another device. Like ``Tensor.to``, tensors that are on the device already are not copied."""
        return self._map(lambda x: x.to(device))

    def _map(self: AnyState, change: Callable[[Tensor], Tensor]) -> AnyState:
        """A new state with ``change`` applied to every tensor."""

        def changed(value: object) -> object:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, State):
                return value._map(change)
            return tuple(changed(part) for part in value) if isinstance(value, tuple) else value

        return replace(self, **{field.name: changed(getattr(self, field.name)) for field in fields(self)})

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        shown = (f"{name}={tuple(value.shape) if isinstance(value, Tensor) else value!r}" for name, value in values)
        return f"{type(self).__name__}({', '.join(shown)})"


def _tensors_of(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, State):
        yield from value.tensors()
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors_of(part)
