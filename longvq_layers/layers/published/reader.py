"""Reads the tensors of one layer out of another implementation's checkpoint, with keys and shapes checked."""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from longvq_layers import _checks as check


def entries(name: str, state_dict: object, prefix: object) -> dict[str, Tensor]:
    """The entries of `state_dict` whose keys start with `prefix`, with this prefix removed from the keys."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{name}: state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"{name}: prefix must be a str, got {type(prefix).__name__}")
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def read(
    name: str,
    layer: str,
    given: Mapping[str, Tensor],
    prefix: str,
    layout: Mapping[str, tuple[str, str]],
    sizes_of: Callable[[Mapping[str, Tensor]], dict[str, int]],
    ignored: Collection[str] = (),
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Check `given`, from `entries`, against `layout`, and rename its tensors.

    Args:
        name: the operation, for errors.
        layer: the other implementation's name of the layer, for errors.
        given: the tensors by their keys in the other implementation.
        prefix: the text before these keys, for errors.
        layout: key in the other implementation -> (key in our layer, shape in letters in the other implementation).
        sizes_of: gives the size of each letter, from tensors that have the right number of dimensions.
        ignored: keys of the other implementation that our layer doesn't need.

    Returns:
        The size of each letter, and the tensors by their keys in our layer.
    """
    missing = [prefix + key for key in layout if key not in given]
    if missing:
        raise ValueError(
            f"{name}: state_dict must have {', '.join(missing)}, got none of them; is prefix={prefix!r} right?"
        )
    unknown = [prefix + key for key in given if key not in layout and key not in ignored]
    if unknown:  # another variant of the layer, which computes something else
        raise ValueError(
            f"{name}: state_dict must have only the keys of {layer}, got {', '.join(unknown)}; is prefix={prefix!r} "
            "right?"
        )
    for key, (_, dims) in layout.items():
        check.tensor(name, prefix + key, given[key], dims)
        check.real(name, prefix + key, given[key])
    sizes = sizes_of(given)
    for key, (_, dims) in layout.items():
        check.size(name, prefix + key, given[key], tuple(sizes[letter] for letter in dims.split()), dims)
    return sizes, {here: given[there] for there, (here, _) in layout.items()}
