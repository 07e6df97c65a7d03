"""`repr` of layers: the call that makes them."""

import inspect

from torch import nn

_HIDDEN = ("self", "device", "dtype", "process_group")  # these say where a module is and who shares it


def arguments_repr(module: nn.Module, cls: type[nn.Module], *parts: nn.Module, **values: object) -> str:
    """The arguments that make `module`, as Python reads them back, for `extra_repr`.

    Args:
        module: an instance of `cls`.
        cls: the class whose `__init__` gives names and order. Arguments without default are shown without name.
        parts: modules that hold arguments which `module` has no attribute for.
        values: arguments that are no attributes, or attributes of another name.

    A dropout module stands for its probability.
    """
    shown = []
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in _HIDDEN:
            continue
        value = values[name] if name in values else _attribute(name, module, *parts)
        if isinstance(value, nn.Module):
            value = value.p  # of a dropout module
        shown.append(repr(value) if parameter.default is inspect.Parameter.empty else f"{name}={value!r}")
    return ", ".join(shown)


def _attribute(name: str, *modules: nn.Module) -> object:
    owner = next(module for module in modules if hasattr(module, name))
    return getattr(owner, name)
