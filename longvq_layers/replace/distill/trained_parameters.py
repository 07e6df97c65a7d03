"""Parameters of a model that distillation has trained, and their values before."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class TrainedParameters:
    """A `Record` of trained parameters: `undo` restores the original values bit by bit.

    It refers to parameters by object, so that a deep copy of the model gets a separate record of its parameters.

    Attributes:
        parameters, originals: parameters, and their values before.
        attached: none; this record puts no attention into a module.
    """

    parameters: list[nn.Parameter] = field(default_factory=list)
    originals: list[Tensor] = field(default_factory=list)
    attached: tuple[nn.Module, ...] = ()

    def add(self, parameter: nn.Parameter) -> None:
        """Remember this parameter's value, unless it is remembered already."""
        if not any(parameter is known for known in self.parameters):
            self.parameters.append(parameter)
            self.originals.append(parameter.detach().clone())

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the values, also if the model has moved to another device or dtype since."""
        for parameter, original in zip(self.parameters, self.originals, strict=True):
            parameter.copy_(original)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Restore the values within the block."""
        trained = [parameter.data for parameter in self.parameters]
        try:
            for parameter, original in zip(self.parameters, self.originals, strict=True):
                parameter.data = original.to(parameter.device, parameter.dtype)
            yield
        finally:
            for parameter, value in zip(self.parameters, trained, strict=True):
                parameter.data = value
