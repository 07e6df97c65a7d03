"""Checkpoints of the public Mega code: their keys and shapes, and the keys in `MegaBlock`."""

from collections.abc import Mapping
from typing import TypedDict

from torch import Tensor
from typing_extensions import NotRequired

from longvq_layers.layers.published import reader

_NAME = "MegaBlock.from_published"

# key in the public code -> (key in `MegaBlock`, shape in the public code)
# W is the number of kernels: D if causal, 2D if bidirectional.
_MEGA = {
    "mega_layer.move.delta": ("ema.delta", "W N 1"),
    "mega_layer.move.alpha": ("ema.alpha", "W N 1"),
    "mega_layer.move.beta": ("ema.beta", "W N 1"),
    "mega_layer.move.gamma": ("ema.gamma", "W N"),
    "mega_layer.move.omega": ("ema.omega", "D"),
    "mega_layer.v_proj.weight": ("v_proj.weight", "E D"),
    "mega_layer.v_proj.bias": ("v_proj.bias", "E"),
    "mega_layer.mx_proj.weight": ("mx_proj.weight", "2D+Z+E D"),
    "mega_layer.mx_proj.bias": ("mx_proj.bias", "2D+Z+E"),
    "mega_layer.h_proj.weight": ("h_proj.weight", "D E"),
    "mega_layer.h_proj.bias": ("h_proj.bias", "D"),
    "mega_layer.gamma": ("gamma", "2 Z"),
    "mega_layer.beta": ("beta", "2 Z"),
}
_BIAS = {
    "simple": {"mega_layer.rel_pos_bias.rel_pos_bias": ("attention.bias.rel_pos_bias", "2M-1")},
    "rotary": {
        "mega_layer.rel_pos_bias.alpha": ("attention.bias.alpha", "1 Z"),
        "mega_layer.rel_pos_bias.beta": ("attention.bias.beta", "1 Z"),
    },
}
_FEED_FORWARD = {
    "nffn.fc1.weight": ("ffn.up.weight", "F D"),
    "nffn.fc1.bias": ("ffn.up.bias", "F"),
    "nffn.fc2.weight": ("ffn.down.weight", "D F"),
    "nffn.fc2.bias": ("ffn.down.bias", "D"),
}
_NORMS = {
    "layer": {"weight": "D", "bias": "D"},
    "rms": {"weight": "D"},
    "scale": {"scalar": "1"},
    "batch": {"weight": "D", "bias": "D", "running_mean": "D", "running_var": "D"},
}
_IGNORED = (  # bookkeeping of the public code
    "mega_layer.rel_pos_bias._float_tensor",
    "mega_layer.norm.norm.num_batches_tracked",
    "nffn.norm.norm.num_batches_tracked",
)


class PublishedSizes(TypedDict):
    """The arguments of `MegaBlock` that follow from a checkpoint's shapes."""

    d_model: int
    d_attn: int
    d_value: int
    d_ff: int
    ema_dim: int
    causal: bool
    rel_pos_bias: str
    max_positions: NotRequired[int]
    norm_type: str


def read_published(
    state_dict: Mapping[str, Tensor], prefix: str, chunk: int | None
) -> tuple[PublishedSizes, dict[str, Tensor]]:
    """The arguments of `MegaBlock` that follow from the shapes under `prefix`, and its state dict.

    See `MegaBlock.from_published`.
    """
    given = reader.entries(_NAME, state_dict, prefix)
    bias = "rotary" if "mega_layer.rel_pos_bias.alpha" in given else "simple"
    norm_type = _norm_type(given)
    layout = _MEGA | _BIAS[bias] | _norm_layout("mega_layer", "norm1", norm_type)
    if any(key.startswith("nffn.") for key in given):
        layout |= _FEED_FORWARD | _norm_layout("nffn", "norm2", norm_type)
    sizes, values = reader.read(_NAME, "a Mega layer", given, prefix, layout, _sizes, _IGNORED)
    if bias == "simple" and chunk is not None and chunk != sizes["M"]:
        raise ValueError(
            f"{_NAME}: chunk must be {sizes['M']}, the positions that {prefix}mega_layer.rel_pos_bias.rel_pos_bias "
            f"covers, or None if the layer attended to all positions, got {chunk}"
        )
    if norm_type == "scale":
        for name in ("norm1.scalar", "norm2.scalar"):
            if name in values:
                values[name] = values[name].squeeze(0)
    options: PublishedSizes = {
        "d_model": sizes["D"],
        "d_attn": sizes["Z"],
        "d_value": sizes["E"],
        "d_ff": sizes.get("F", 0),
        "ema_dim": sizes["N"],
        "causal": sizes["W"] == sizes["D"],
        "rel_pos_bias": bias,
        "norm_type": norm_type,
    }
    if bias == "simple":
        options["max_positions"] = sizes["M"]
    return options, values


def _norm_type(given: Mapping[str, object]) -> str:
    at = "mega_layer.norm.norm."
    if at + "scalar" in given:
        return "scale"
    if at + "running_mean" in given:
        return "batch"
    return "rms" if at + "weight" in given and at + "bias" not in given else "layer"


def _norm_layout(there: str, here: str, norm_type: str) -> dict[str, tuple[str, str]]:
    return {f"{there}.norm.norm.{name}": (f"{here}.{name}", dims) for name, dims in _NORMS[norm_type].items()}


def _sizes(given: Mapping[str, Tensor]) -> dict[str, int]:
    """The size of each letter, from one tensor. `reader.read` checks the others against it."""
    value, width = given["mega_layer.v_proj.weight"].shape
    kernels, averages = given["mega_layer.move.gamma"].shape
    attn = given["mega_layer.gamma"].shape[1]
    if kernels != width:
        kernels = 2 * width  # any other number is then refused as a wrong shape
    sizes = {"D": width, "E": value, "Z": attn, "N": averages, "W": kernels, "2D+Z+E": 2 * width + attn + value}
    sizes |= {"1": 1, "2": 2}
    if "mega_layer.rel_pos_bias.rel_pos_bias" in given:
        offsets = len(given["mega_layer.rel_pos_bias.rel_pos_bias"])
        sizes |= {"M": (offsets + 1) // 2, "2M-1": (offsets + 1) // 2 * 2 - 1}
    if "nffn.fc1.weight" in given:
        sizes["F"] = given["nffn.fc1.weight"].shape[0]
    return sizes
