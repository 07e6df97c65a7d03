"""Random inputs for any model of transformers, from the names in the signature of its forward."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longvq_layers.benchmarks.architectures.run_model import Inputs
from longvq_layers.benchmarks.architectures.tiny import FIRST_SPECIAL

BATCH, LENGTH = 2, 41
PADDING = 9  # tokens at the end of the last row
_MAIN = ("input_ids", "pixel_values", "input_values", "input_features", "pixel_values_videos", "inputs_embeds")


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Keyword arguments to try, the fewest first."""
    config: Any = model.config
    main_input = str(model.main_input_name)
    parameters = inspect.signature(model.forward).parameters
    given = [name for name in parameters if name not in ("args", "kwargs", "self")]
    required = [name for name in given if parameters[name].default is inspect.Parameter.empty]
    required = [name for name in required if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD]
    main = [name for name in (main_input, *_MAIN) if name in given][:1]
    also = [name for name in ("decoder_input_ids",) if name in given and config.is_encoder_decoder]
    others = [name for name in _MAIN if name in given and name not in ("inputs_embeds", *main)]
    for names in ([*required, *main, *also], [*required, *main, *others, *also]):
        for variant in range(3):
            try:
                yield {name: _value(name, model, variant) for name in dict.fromkeys(names)}
            except LookupError:
                continue


def padded(model: nn.Module, inputs: Inputs) -> Inputs | None:
    """The same inputs with padding in the last row; None if the model takes no mask of tokens."""
    ids = inputs.get("input_ids")
    if ids is None or "attention_mask" not in inspect.signature(model.forward).parameters:
        return None
    mask = torch.ones_like(ids)
    mask[-1, -PADDING:] = 0
    return {**inputs, "attention_mask": mask}


def _value(name: str, model: nn.Module, variant: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if name in ("input_ids", "decoder_input_ids"):
        length = LENGTH if name == "input_ids" else LENGTH - 8
        most = min(FIRST_SPECIAL, _size(model.config, ("vocab_size",), FIRST_SPECIAL))
        return torch.randint(min(3, most - 1), most, (BATCH, length), generator=generator)
    if name in ("pixel_values", "pixel_values_videos"):
        height, width = _image_size(model.config)
        channels = _size(model.config, ("num_channels", "in_channels", "in_chans"), 3)
        frames = _size(model.config, ("num_frames",), 4)
        shapes = [(BATCH, channels, height, width), (BATCH, frames, channels, height, width)]
        shapes += [(BATCH, 1, channels, height, width)]
        return normal(*shapes[variant if name == "pixel_values" else 1])
    if name == "input_values":
        return normal(*[(BATCH, 2000), (BATCH, 1, 4000), (BATCH, LENGTH, 16)][variant])
    if name == "input_features":
        bins = _size(model.config, ("num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim"), 80)
        frames = 2 * _size(model.config, ("max_source_positions",), LENGTH)
        return normal(*[(BATCH, bins, frames), (BATCH, frames, bins), (BATCH, 1, frames, bins)][variant])
    if name in ("hidden_states", "inputs_embeds", "encoder_hidden_states"):
        width = _size(model.config, ("hidden_size", "d_model", "embed_dim"), 32)
        if name == "hidden_states" and "grid_thw" in inspect.signature(model.forward).parameters:
            width = _patch_size(model.config)
            return normal(48, width)
        return normal(BATCH, LENGTH, width)
    if name in ("grid_thw", "image_grid_thw"):
        return torch.tensor([[1, 4, 4], [1, 4, 8]])
    raise LookupError(name)


def _patch_size(config: object) -> int:
    """Numbers in a patch of a picture or film."""
    sizes = [_size(config, (name,), 1) for name in ("in_channels", "num_channels")]
    patch = _size(config, ("patch_size",), 4)
    return max(max(sizes), 3) * _size(config, ("temporal_patch_size",), 1) * patch * patch


def _image_size(config: object) -> tuple[int, int]:
    size = next((value for value in _found(config, ("image_size", "img_size", "input_size")) if value), 24)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def _size(config: object, names: tuple[str, ...], default: int) -> int:
    return next((value for value in _found(config, names) if type(value) is int and value > 0), default)


def _found(config: object, names: tuple[str, ...]) -> Iterator[Any]:
    """Values of these names in this config, then in the configs inside it."""
    yield from (getattr(config, name, None) for name in names if hasattr(config, name))
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from _found(value, names)
