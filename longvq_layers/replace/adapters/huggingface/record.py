"""What a replacement changes in a transformers model, and how it is undone."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.adapters.huggingface.attach import ReplacedImplementation
from longvq_layers.replace.adapters.huggingface.forward_hook import ContextHook
from longvq_layers.replace.adapters.huggingface.register import register_attn_implementation
from longvq_layers.replace.adapters.huggingface.support import (
    IMPLEMENTATION,
    NO_ATTENTION_WEIGHTS,
    config_of,
    takes_part,
)
from longvq_layers.replace.slot.attention_slot import AttentionSlot, fill_slot, find_slot, remove_slot


@dataclass(frozen=True, eq=False)
class ConfigCopy:
    """Our copy of a model's config.

    Attributes:
        ours: the copy, which names our attention implementation.
        theirs: the original config.
        at_first: the attributes of `ours` when it was made.
    """

    ours: Any
    theirs: Any
    at_first: dict[str, object]


class Guard:
    """Forward pre-hook of a replaced model: refuses calls that would bypass the replaced attention.

    Args:
        configs: our copies of the configs, which name the attention of the replaced modules.
    """

    def __init__(self, configs: Sequence[Any]) -> None:
        self.configs = configs

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Raise NotImplementedError if attention weights are asked for, RuntimeError if another attention was set."""
        if kwargs.get("output_attentions"):
            raise NotImplementedError(NO_ATTENTION_WEIGHTS)
        for config in self.configs:
            if config._attn_implementation != IMPLEMENTATION:
                raise RuntimeError(
                    f"longvq attention: the attention of a replaced model was set to {config._attn_implementation!r} "
                    "(set_attn_implementation?), so its codebooks would not be used; call restore_attention(model) to "
                    "undo the replacement, then set it"
                )


@dataclass(frozen=True, eq=False)
class HuggingFaceRecord:
    """The modules that get a slot or our config, and the models that get the guard.

    Attributes:
        attached: attention modules that get a slot.
        configs: every module that gets our copy of its config, with the original config.
        copies: one per config.
        guarded: the transformers models around the attention modules.
        guard: their hook.
    """

    attached: tuple[nn.Module, ...]
    configs: tuple[tuple[nn.Module, Any], ...]
    copies: tuple[ConfigCopy, ...]
    guarded: tuple[nn.Module, ...]
    guard: Guard

    def install(self, slots: Sequence[AttentionSlot]) -> None:
        """Fill the slots, set our configs, and hook the modules."""
        register_attn_implementation()
        ours = {id(copied.theirs): copied.ours for copied in self.copies}
        was_eager = {id(module): config._attn_implementation == "eager" for module, config in self.configs}
        for module, config in self.configs:
            module.config = ours[id(config)]
        for module, slot in zip(self.attached, slots, strict=True):
            eager = was_eager[id(module)]
            fill_slot(module, slot)
            hook = ContextHook(module, eager=eager, skips_masks=not eager)
            module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in self.guarded:
            module.register_forward_pre_hook(self.guard, with_kwargs=True)

    def undo(self) -> None:
        """Put everything back. Copy changes that other code has made in our configs to the original configs."""
        for copied in self.copies:
            _carry_over(copied)
        for module, config in self.configs:
            module.config = config
        for module in self.attached:
            remove_slot(module)
            _remove_hooks(module, ContextHook)
        for module in self.guarded:
            _remove_hooks(module, self.guard)


def plan_record(model: nn.Module, sites: Sequence[Site], *, linear_masks: bool) -> HuggingFaceRecord:
    """The record of a replacement of these sites; changes nothing.

    Args:
        linear_masks: also let `longvq_mask` make the masks, where every attention module of a config is replaced.
    """
    modules = tuple(site.module for site in sites)
    configs = [(module, config_of(module)) for module in modules]
    copies = {}
    for _, config in configs:
        if id(config) not in copies:
            ours = copy.copy(config)
            # The dict form: the setter would otherwise write into sub-configs, which other models may share.
            ours._attn_implementation = {"": ReplacedImplementation(IMPLEMENTATION)}
            copies[id(config)] = ConfigCopy(ours, config, dict(ours.__dict__))
    if linear_masks:
        configs += _modules_that_make_masks(model, modules)
    ids = {id(module) for module in modules}
    guarded = [
        module
        for module in model.modules()
        if _is_pretrained(module) and any(id(child) in ids or is_replaced(child) for child in module.modules())
    ]
    guard = Guard([copied.ours for copied in copies.values()])
    return HuggingFaceRecord(modules, tuple(configs), tuple(copies.values()), tuple(guarded), guard)


def is_replaced(module: nn.Module) -> bool:
    """Whether this is a transformers attention module with a slot."""
    return takes_part(module) and find_slot(module) is not None


def _modules_that_make_masks(model: nn.Module, attention: Sequence[nn.Module]) -> list[tuple[nn.Module, Any]]:
    """Other modules with the config of replaced modules, if all attention modules with this config are replaced.

    Then no other attention reads our masks. The list is empty after an earlier replacement, because restoring one of
    the two would break the other.
    """
    replaced = {id(module) for module in attention}
    if any(is_replaced(module) and id(module) not in replaced for module in model.modules()):
        return []
    result: list[tuple[nn.Module, Any]] = []
    for config in {id(config_of(module)): config_of(module) for module in attention}.values():
        others = [
            module
            for module in model.modules()
            if module.__dict__.get("config") is config and id(module) not in replaced
        ]
        if not any(_may_use_masks(module, replaced) for module in others):
            result += [(module, config) for module in others]
    return result


def _may_use_masks(module: nn.Module, replaced: set[int]) -> bool:
    if takes_part(module):
        return True
    looks_like_attention = "atten" in type(module).__name__.lower() and not _is_pretrained(module)
    return looks_like_attention and not any(id(child) in replaced for child in module.modules())


def _carry_over(copied: ConfigCopy) -> None:
    # For example, a new vocabulary size: the model keeps the new embedding, so the original config must name its size.
    ours, theirs, at_first = copied.ours, copied.theirs, copied.at_first
    for name in at_first.keys() - ours.__dict__.keys():
        theirs.__dict__.pop(name, None)
    for name, value in ours.__dict__.items():
        if name == "_attn_implementation_internal":
            continue  # the change that is being undone
        if name not in at_first or at_first[name] is not value:
            theirs.__dict__[name] = value


def _remove_hooks(module: nn.Module, ours: object) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is ours or type(hook) is ours]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_pretrained(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)
