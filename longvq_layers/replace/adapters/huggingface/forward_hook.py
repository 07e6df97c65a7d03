"""Forward pre-hook of a replaced module: reads positions and cache from the call, for its attention function."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from longvq_layers.replace.adapters.huggingface.rotary import POSITION_EMBEDDINGS
from longvq_layers.replace.adapters.huggingface.support import forward_of, needs_keys
from longvq_layers.replace.slot.attention_slot import AttentionSlot, slot_of
from longvq_layers.replace.slot.context import CacheLayer, ForwardContext, KeyProbe, store_context

_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")  # names of the argument


class ContextHook:
    """Stores the `ForwardContext` of each forward in the module's slot, for `claim_context`.

    Args:
        module: the module. The hook stores facts about its class, not the module.
        eager, skips_masks: properties of the original attention, as in `ForwardContext`.
    """

    def __init__(self, module: nn.Module, *, eager: bool = False, skips_masks: bool = False) -> None:
        self.names = tuple(inspect.signature(forward_of(module)).parameters)[1:]
        self.eager, self.skips_masks = eager, skips_masks
        self.needs_keys = needs_keys(module) is not None

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        """Raise NotImplementedError for positions that can't be removed, ValueError if they are missing."""
        slot = slot_of(module)
        store_context(slot, ForwardContext())  # drops the context of an earlier forward that raised
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        rotation = given.get(POSITION_EMBEDDINGS)
        if slot.rotary is not None and slot.rotary.part is None:
            _detect_rotation(module, slot, given)
        if slot.rotary is not None and rotation is None:
            raise ValueError(
                f"longvq attention: {POSITION_EMBEDDINGS} must be (cos, sin), got None, but the codes of this module "
                "have no positions"
            )
        layer = None if self.needs_keys else _cache_layer(module, slot, given)
        used = None if slot.rotary is None else rotation
        store_context(slot, ForwardContext(used, layer, self.eager, self.skips_masks))


def _cache_layer(module: nn.Module, slot: AttentionSlot, given: dict[str, Any]) -> CacheLayer | None:
    cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    attention = slot.step_attention
    if cache is None or attention is None:
        return None
    if not getattr(module, "is_causal", True):
        return None
    inputs = (x for x in given.values() if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*module.parameters(), *inputs)):
        return None  # no gradient goes through a state that is updated in place
    from longvq_layers.replace.adapters.huggingface.cache import take_over  # needs transformers, which is optional

    return take_over(cache, getattr(module, "layer_idx", None), attention)


def _detect_rotation(module: nn.Module, slot: AttentionSlot, given: dict[str, Any]) -> None:
    """Run the module with its own positions and with none, and compare the keys with what ClampedRotary gives."""
    rotation, why = given.get(POSITION_EMBEDDINGS), "its keys are not what its rotation says"
    if isinstance(rotation, tuple) and len(rotation) == 2 and all(isinstance(x, Tensor) for x in rotation):
        cos, sin = rotation
        rotated = _keys(module, slot, given, rotation)
        plain = _keys(module, slot, given, (torch.ones_like(cos), sin.new_zeros(sin.shape)))
        if torch.equal(rotated, plain) and bool((sin != 0).any()):
            slot.rotary, slot.has_positions = None, False
            return
        if slot.rotary is not None and slot.rotary.detect_rotated_columns(rotated, plain, cos, sin):
            return
    else:
        why = f"its {POSITION_EMBEDDINGS} are not (cos, sin)"
    if slot.keep_rotated(why):
        return
    raise NotImplementedError(
        f'longvq attention: far_positions must be "rotated" in {type(module).__name__}, got "rectified", which is '
        f"impossible: {why}"
    )


def _keys(module: nn.Module, slot: AttentionSlot, given: dict[str, Any], rotation: tuple[Tensor, Tensor]) -> Tensor:
    """The keys that reach the attention function with these positions."""
    given = {**given, POSITION_EMBEDDINGS: rotation, **{name: None for name in _CACHES if name in given}}
    probe = KeyProbe()
    store_context(slot, ForwardContext(probe=probe))
    try:
        with torch.no_grad():
            module.forward(**given)
    finally:
        store_context(slot, ForwardContext())
    if probe.keys is None:
        raise RuntimeError(f"longvq attention: {type(module).__name__} did not call its attention function")
    return probe.keys
