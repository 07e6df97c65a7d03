"""Checkpoints of the public minimal S4D layer: their keys and shapes, and the keys in `S4DLayer`."""

from collections.abc import Mapping

from torch import Tensor

from longvq_layers.layers.published import reader

# key in the public code -> (key in `S4DLayer`, shape in the public code)
_LAYOUT = {
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
    name = "S4DLayer.from_minimal"
    given = reader.entries(name, state_dict, prefix)
    _, values = reader.read(name, "the minimal S4D layer", given, prefix, _LAYOUT, _sizes)
    values["out_proj.weight"] = values["out_proj.weight"].squeeze(-1)  # a convolution of width 1 is a linear layer
    return values


def _sizes(given: Mapping[str, Tensor]) -> dict[str, int]:
    width, modes = given["kernel.A_imag"].shape
    return {"H": width, "N": modes, "2H": 2 * width, "2": 2, "1": 1}
