"""Checkpoints of other implementations: what lies under a prefix, with keys and shapes checked."""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from longvq_layers import _checks as check


def entries(caller: str, state_dict: object, prefix: object) -> dict[str, object]:
    """What `state_dict` has under `prefix`, by the rest of the keys."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{caller}: state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"{caller}: prefix must be a str, got {type(prefix).__name__}")
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def read(
    caller: str,
    layer: str,
    given: Mapping[str, object],
    prefix: str,
    layout: Mapping[str, tuple[str, str]],
    sizes_of: Callable[[Mapping[str, Tensor]], dict[str, int]],
    ignored: Collection[str] = (),
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Check `given`, from `entries`, against `layout`: {key there: (key here, its shape there in letters)}.

    Args:
        caller, layer: who asks, and what the other implementation's layer is called in an error.
        prefix: what stood before the keys, for errors.
        sizes_of: what the letters stand for, from tensors that have the right number of dimensions.
        ignored: keys there that are of no use here.

    Returns:
        The sizes, and the tensors by their keys here.
    """
    missing = [prefix + key for key in layout if key not in given]
    if missing:
        raise ValueError(f"{caller}: state_dict lacks {', '.join(missing)}; is prefix={prefix!r} right?")
    unknown = [prefix + key for key in given if key not in layout and key not in ignored]
    if unknown:  # another variant of the layer, which would compute something else
        raise ValueError(f"{caller}: {layer} has no {', '.join(unknown)}; is prefix={prefix!r} right?")
    for key, (_, dims) in layout.items():
        check.tensor(caller, prefix + key, given[key], dims)
        check.real(caller, prefix + key, given[key])
    sizes = sizes_of(given)
    for key, (_, dims) in layout.items():
        check.size(caller, prefix + key, given[key], tuple(sizes[letter] for letter in dims.split()), dims)
    return sizes, {name: given[key] for key, (name, _) in layout.items()}
