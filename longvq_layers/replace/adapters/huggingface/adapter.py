"""Transformers models: which modules can be swapped, and how they are.

Nothing existing is changed. The name "longvq" is added to transformers' two public registries; a replaced module gets
a copy of its config with `_attn_implementation="longvq"` and a submodule `longvq` that holds the codebook. If every
attention module that shares a config object is replaced, all modules of this model that share it get the copy, so the
masks are created by `longvq_mask` in O(B·L); otherwise the model keeps making its dense masks, which are verified.
"""

import copy
import inspect
import sys
from dataclasses import dataclass, field

from torch import nn

from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.adapters.huggingface import attach as by_name
from longvq_layers.replace.adapters.huggingface import forward_hook as calls
from longvq_layers.replace.adapters.huggingface import support as refusals

NAME = "longvq"


def find(model: nn.Module) -> list[Site]:
    """Every module whose forward looks its attention up in transformers' attention interface."""
    return [_site(name, module) for name, module in model.named_modules() if _takes_part(module)]


def is_replaced(module: nn.Module) -> bool:
    """Whether this module's attention is ours already."""
    return _takes_part(module) and NAME in module._modules


@dataclass
class Installed:
    """Swaps modules and remembers what it changed, by object, so that a deep copy of the model can undo it too."""

    configs: list[tuple[nn.Module, object]] = field(default_factory=list)
    copies: list[tuple[object, object, dict]] = field(default_factory=list)  # ours, theirs, attributes at first
    attached: list[nn.Module] = field(default_factory=list)
    hooked: list[nn.Module] = field(default_factory=list)
    guard: "Guard | None" = None

    def install(self, model: nn.Module, sites: list[Site], seams: list[nn.Module], *, masks: bool) -> None:
        """Attach one seam per site and let the attention interface find it.

        Args:
            masks: also let our mask function make the masks, where every attention module of a config is replaced.
        """
        by_name.register_attn_implementation()
        copies: dict[int, object] = {}
        for site, seam in zip(sites, seams, strict=True):
            config = site.module.config
            if id(config) not in copies:
                copies[id(config)] = ours = copy.copy(config)
                # The dict form: the setter would otherwise write into sub-configs, which other models may share.
                ours._attn_implementation = {"": by_name.OfReplacement(NAME)}
                self.copies.append((ours, config, dict(ours.__dict__)))
            self.configs.append((site.module, config))
            eager = config._attn_implementation == "eager"
            site.module.config = copies[id(config)]
            self.attached.append(site.module)
            site.module.longvq = seam
            site.module.register_forward_pre_hook(
                calls.NoteCall(site.module, eager=eager, skips_masks=not eager), with_kwargs=True
            )
        for module, config in _sharing(model, sites, self.configs) if masks else ():
            self.configs.append((module, config))
            module.config = copies[id(config)]
        self.guard = Guard(list(copies.values()))
        for module in model.modules():
            if _is_pretrained(module) and any(is_replaced(child) for child in module.modules()):
                self.hooked.append(module)
                module.register_forward_pre_hook(self.guard, with_kwargs=True)

    def undo(self) -> None:
        """Put everything back; what was changed in our configs meanwhile stays changed in theirs."""
        for ours, theirs, at_first in self.copies:
            _carry_over(ours, theirs, at_first)
        for module, config in self.configs:
            module.config = config
        for module in self.attached:
            module._modules.pop(NAME, None)
            _remove_hooks(module, calls.NoteCall)
        for module in self.hooked:
            _remove_hooks(module, self.guard)


class Guard:
    """Forward pre-hook of a replaced model: refuses what would bypass the replaced attention.

    Args:
        configs: our copies, which the replaced modules look their attention up in.
    """

    def __init__(self, configs: list) -> None:
        self.configs = configs

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Raises NotImplementedError for attention weights, RuntimeError if another attention was set meanwhile."""
        if kwargs.get("output_attentions"):
            raise NotImplementedError(
                "longvq attention: output_attentions: got True, but attention weights are never formed (they would be "
                "L x L); pass output_attentions=False or restore_attention(model)"
            )
        for config in self.configs:
            if config._attn_implementation != NAME:
                raise RuntimeError(
                    f"longvq attention: the attention of a replaced model was set to {config._attn_implementation!r} "
                    "(set_attn_implementation?), so its codebooks would not be used; call restore_attention(model) to "
                    "undo the replacement, then set it"
                )


def _carry_over(ours: object, theirs: object, at_first: dict) -> None:
    # A new vocabulary, a padding token: the model has them, its config must say so.
    for name in at_first.keys() - ours.__dict__.keys():
        theirs.__dict__.pop(name, None)
    for name, value in ours.__dict__.items():
        if name == "_attn_implementation_internal":
            continue  # which is being undone
        if name not in at_first or at_first[name] is not value:
            theirs.__dict__[name] = value


def _remove_hooks(module: nn.Module, ours: object) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is ours or type(hook) is ours]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def original_function(module: nn.Module):
    """The attention function that this module calls by itself."""
    scope = inspect.unwrap(type(module).forward).__globals__
    default = scope.get("eager_attention_forward")
    name = module.config._attn_implementation
    return scope["ALL_ATTENTION_FUNCTIONS"].get_interface("sdpa" if name == NAME else name, default)


def _takes_part(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    looks_it_up = code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
    return looks_it_up and hasattr(getattr(module, "config", None), "_attn_implementation")


def _is_pretrained(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def _site(name: str, module: nn.Module) -> Site:
    kind, implementation = type(module).__name__, module.config._attn_implementation
    return Site(
        name=name,
        module=module,
        adapter=sys.modules[__name__],
        kind=f"{kind}[{implementation}]",
        new_kind=f"{kind}[{NAME}]",
        causal="yes" if getattr(module, "is_causal", True) else "no",
        sizes=_sizes(module),
        refusal=refusals.refusal(name, module),
        has_rotary=refusals.has_rotary(module),
        notes=refusals.notes(module),
    )


def _sizes(module: nn.Module) -> tuple[int, int, int] | None:
    # H, Hkv and D as the usual attribute names tell them; None where they don't (then calibration does).
    config = module.config
    query_heads = _first((module, config), ("num_heads", "num_attention_heads", "n_heads", "n_head"))
    heads = _first((module, config), ("num_key_value_heads", "num_kv_heads")) or query_heads
    dim = _first((module, config), ("head_dim", "attention_head_size", "head_size", "dim_head"))
    width = _first((module, config), ("embed_dim", "hidden_size", "d_model"))
    if dim is None and width is not None and query_heads:
        dim = width // query_heads
    return None if query_heads is None or dim is None else (query_heads, heads, dim)


def _first(owners: tuple, names: tuple[str, ...]) -> int | None:
    values = (_value(owner, name) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _sharing(model: nn.Module, sites: list[Site], configs: list[tuple[nn.Module, object]]):
    # The other modules that share a config whose attention modules are all replaced: nobody else sees our masks.
    # With modules of an earlier replacement the masks stay dense: else restoring one of the two would break the other.
    replaced = {id(site.module) for site in sites}
    if any(is_replaced(module) and id(module) not in replaced for module in model.modules()):
        return []
    result = []
    for config in {id(config): config for _, config in configs}.values():
        others = [module for module in model.modules() if module.__dict__.get("config") is config]
        if not any(_uses_masks(module, replaced) for module in others):
            result += [(module, config) for module in others]
    return result


def _uses_masks(module: nn.Module, replaced: set[int]) -> bool:
    if _takes_part(module):
        return True
    looks_like_attention = "atten" in type(module).__name__.lower() and not _is_pretrained(module)
    return looks_like_attention and not any(id(child) in replaced for child in module.modules())


def _value(owner: object, name: str) -> object:
    try:
        return getattr(owner, name, None)
    except RuntimeError:  # of a config whose layers differ in it
        return None
