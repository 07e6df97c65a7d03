"""Checkpoints of the public minimal S4D layer: their keys and shapes, and the keys they get here."""

from collections.abc import Mapping

from torch import Tensor

from longvq_layers.ops import _checks as check

# key there -> key in `S4DLayer`, shape there
_MINIMAL = {
    "D": ("ssm.D", "H"),
    "kernel.log_dt": ("ssm.log_dt", "H"),
    "kernel.log_A_real": ("ssm.log_A_real", "H N"),
    "kernel.A_imag": ("ssm.A_imag", "H N"),
    "kernel.C": ("ssm.C", "H N 2"),
    "output_linear.0.weight": ("out_proj.weight", "2H H 1"),
    "output_linear.0.bias": ("out_proj.bias", "2H"),
}


def read_minimal(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of `state_dict` under `prefix`, by the keys of `S4DLayer`. See `S4DLayer.from_minimal`."""
    caller = "S4DLayer.from_minimal"
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{caller}: state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"{caller}: prefix must be a str, got {type(prefix).__name__}")
    missing = [prefix + key for key in _MINIMAL if prefix + key not in state_dict]
    if missing:
        raise ValueError(f"{caller}: state_dict lacks {', '.join(missing)}; is prefix={prefix!r} right?")
    known = {prefix + key for key in _MINIMAL}
    unknown = [key for key in state_dict if key.startswith(prefix) and key not in known]
    if unknown:  # another variant of the layer, which would compute something else
        raise ValueError(f"{caller}: the minimal S4D layer has no {', '.join(unknown)}; is prefix={prefix!r} right?")
    for key, (_, dims) in _MINIMAL.items():
        check.tensor(caller, prefix + key, state_dict[prefix + key], dims)
        check.real(caller, prefix + key, state_dict[prefix + key])
    width, modes = state_dict[prefix + "kernel.A_imag"].shape
    sizes = {"H": width, "N": modes, "2H": 2 * width, "2": 2, "1": 1}
    for key, (_, dims) in _MINIMAL.items():
        expected = tuple(sizes[letter] for letter in dims.split())
        check.size(caller, prefix + key, state_dict[prefix + key], expected, dims)
    values = {name: state_dict[prefix + key] for key, (name, _) in _MINIMAL.items()}
    values["out_proj.weight"] = values["out_proj.weight"].squeeze(-1)  # a convolution of width 1 is a linear layer
    return values
