"""The registered classes, each with its adapter function."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Registered:
    """What `register_adapter` was given for one class, and the class that its replaced modules get."""

    forward: Callable[..., object]
    sizes: Callable[[nn.Module], tuple[int, int, int]] | None
    check: bool
    swapped: type[nn.Module]


_registered: dict[type[nn.Module], Registered] = {}


def register(cls: type[nn.Module], entry: Registered) -> None:
    """Add a class, or replace its entry."""
    _registered[cls] = entry


def registered_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The registered class from which `cls` has its forward, or None."""
    return next((known for known in cls.__mro__ if known in _registered and cls.forward is known.forward), None)


def registered_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The first registered class in the bases of `cls`, or None."""
    return next((known for known in cls.__mro__ if known in _registered), None)


def entry_of(cls: type[nn.Module]) -> Registered:
    """The entry of a registered class."""
    return _registered[cls]
