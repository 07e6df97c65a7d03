"""Finds the rotary embedding of a transformers attention module, and clamps its positions to the window."""

import copy
import inspect

import torch
from torch import nn

from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.adapters.huggingface.support import config_of, forward_of, needs_keys
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary, is_known_rotation

POSITION_EMBEDDINGS = "position_embeddings"  # the argument (cos, sin) of attention modules
_APPLY = "apply_rotary_pos_emb"


def clamped_rotary(model: nn.Module, site: Site, window: int) -> ClampedRotary | str:
    """The site's own rotation, clamped to the window, or why there is none."""
    module = site.module
    if not _rotates_by_embeddings(module):
        return "its forward doesn't rotate by position_embeddings in the usual way"
    if (reason := needs_keys(module)) is not None:
        return reason
    embedding = _embedding_around(model, site.name)
    if embedding is None:
        return "no rotary embedding (a module with inv_freq) was found around it"
    layer_types, index = getattr(config_of(module), "layer_types", None), getattr(module, "layer_idx", None)
    options = {}
    if "layer_type" in inspect.signature(forward_of(embedding)).parameters and layer_types is not None:
        options = {"layer_type": layer_types[index]}
    device = next(embedding.buffers()).device
    position = torch.full((1, 1), window, device=device)
    try:
        with torch.no_grad():  # a copy, because some embeddings remember the longest position
            cos, sin = copy.deepcopy(embedding)(torch.zeros(1, device=device), position, **options)
    except Exception as error:  # it is called in another way, or has no positions for layers of this type
        return f"its rotary embedding gives no positions here ({type(error).__name__}: {error})"
    if cos.dim() != 3:
        return f"its positions have more than one dimension (cos of shape {tuple(cos.shape)})"
    apply = forward_of(module).__globals__[_APPLY]
    if not is_known_rotation(apply):
        return "its apply_rotary_pos_emb takes other arguments than the usual ones"
    return ClampedRotary(apply, cos[0, 0].float(), sin[0, 0].float())


def _rotates_by_embeddings(module: nn.Module) -> bool:
    forward = forward_of(module)
    return _APPLY in forward.__code__.co_names and POSITION_EMBEDDINGS in inspect.signature(forward).parameters


def _embedding_around(model: nn.Module, name: str) -> nn.Module | None:
    """The rotary embedding of the nearest module around this one."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        for child in model.get_submodule(".".join(parts[:depth])).children():
            if any(buffer.endswith("inv_freq") for buffer, _ in child.named_buffers(recurse=False)):
                return child
    return None
