"""The inputs of a model, as users give them to calibration and distillation, and what a model returns."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# One call of a model: its only argument, its positional or its keyword arguments
ModelInputs = Tensor | tuple[object, ...] | list[object] | Mapping[str, object]
Value = TypeVar("Value")


def check_inputs(operation: str, argument: str, inputs: object) -> None:
    """Check the type of all inputs together, without taking any.

    Raises:
        TypeError: one input instead of an iterable of inputs, or no iterable.
    """
    if isinstance(inputs, (Tensor, Mapping, str)) or not isinstance(inputs, Iterable):
        raise TypeError(
            f"{operation}: {argument} must be an iterable of model inputs, got {type(inputs).__name__}; wrap one input "
            f"in a list: {argument}=[batch], a map-style Dataset in a DataLoader"
        )


def read_inputs(operation: str, argument: str, inputs: Iterable[ModelInputs]) -> list[ModelInputs]:
    """All inputs as a list.

    Raises:
        TypeError: an input that is no tensor, tuple or dict.
        ValueError: no input at all.
    """
    batches = list(inputs)
    if not batches:
        raise ValueError(f"{operation}: {argument} must have at least one input, got none; is it a used-up iterator?")
    for batch in batches:
        if not isinstance(batch, (Tensor, tuple, list, Mapping)):
            raise TypeError(
                f"{operation}: {argument} must hold tensors, tuples of positional arguments or dicts of keyword "
                f"arguments, got an input of type {type(batch).__name__}"
            )
    return batches


def run_model(model: nn.Module, inputs: ModelInputs) -> object:
    """Call `model` with a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*map(_copy_of_dict, inputs)) if isinstance(inputs, (tuple, list)) else model(inputs)


def run_in_eval(model: nn.Module, batches: Iterable[ModelInputs], before: Callable[[int], None] | None = None) -> None:
    """Run every batch through the model in eval mode and without gradients, then restore the modes.

    Args:
        before: called with the number of each batch before it runs.
    """
    with keep_modes(model), torch.no_grad():
        model.eval()
        for number, batch in enumerate(batches):
            if before is not None:
                before(number)
            run_model(model, batch)


@contextlib.contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of every module at the end of the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def main_output(output: object) -> Tensor:
    """The first floating tensor with a dimension in what a module returned: not a loss and not token ids."""
    tensors = tensors_in(output)
    return next((x for x in tensors if x.dim() and x.is_floating_point()), tensors[0])


def tensors_in(output: object) -> list[Tensor]:
    """The tensors in what a module returned: a tensor, a tuple, a dict or a ModelOutput of transformers."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    values = output if isinstance(output, tuple | list) else (output,)
    return [x for x in values if isinstance(x, Tensor)]


def clone_tensors(x: Value, memo: dict[object, Tensor] | None = None) -> Value:
    """A copy of nested tuples, lists and dicts with cloned tensors; equal views of one memory become one tensor."""
    copied: Value = _clone(x, {} if memo is None else memo)
    return copied


def _clone(x: Any, memo: dict[object, Tensor]) -> Any:  # the same structure as x, whatever it is
    if type(x) in (tuple, list):
        return type(x)(_clone(value, memo) for value in x)
    if type(x) is dict:
        return {key: _clone(value, memo) for key, value in x.items()}
    if not isinstance(x, Tensor):
        return x
    place = (x.data_ptr(), x.shape, x.stride(), x.dtype)
    if place not in memo:
        memo[place] = x.clone()
    return memo[place]


def _copy_of_dict(value: object) -> object:
    # Some models add what they compute to the dict that they are given.
    return copy.copy(value) if isinstance(value, Mapping) else value
