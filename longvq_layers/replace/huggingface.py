"""Transformers models: which modules can be swapped, and the attention function that they call afterwards.

Nothing existing is changed. The name "longvq" is added to transformers' two public registries; a replaced module gets
a copy of its config with `_attn_implementation="longvq"` and a submodule `longvq` that holds the codebook. If every
attention module that shares a config object is replaced, all modules of this model that share it get the copy, so the
masks are created by `longvq_mask` in O(B·L); otherwise the model keeps making its dense masks, which are verified.
"""

import contextlib
import copy
import inspect
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from longvq_layers.replace import huggingface_by_name as by_name
from longvq_layers.replace import huggingface_calls as calls
from longvq_layers.replace import huggingface_refusals as refusals
from longvq_layers.replace._site import Site
from longvq_layers.replace.calibration import Recorder
from longvq_layers.replace.huggingface_masks import read_mask

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
                ours._attn_implementation = {"": NAME}
            self.configs.append((site.module, config))
            eager = config._attn_implementation == "eager"
            site.module.config = copies[id(config)]
            self.attached.append(site.module)
            site.module.longvq = seam
            site.module.register_forward_pre_hook(calls.NoteCall(site.module, eager=eager), with_kwargs=True)
        for module, config in _sharing(model, sites, self.configs) if masks else ():
            self.configs.append((module, config))
            module.config = copies[id(config)]
        self.guard = Guard(list(copies.values()))
        for module in model.modules():
            if _is_pretrained(module) and any(is_replaced(child) for child in module.modules()):
                self.hooked.append(module)
                module.register_forward_pre_hook(self.guard, with_kwargs=True)

    def undo(self) -> None:
        """Put everything back."""
        for module, config in self.configs:
            module.config = config
        for module in self.attached:
            module._modules.pop(NAME, None)
            _remove_hooks(module, calls.NoteCall)
        for module in self.hooked:
            _remove_hooks(module, self.guard)


def longvq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: query (B, H, q, D), key and value (B, Hkv, k, D).

    `dropout` isn't applied to the probabilities; the report says so for every layer that has one.

    Returns:
        output (B, q, H, E), and None for the attention weights.
    """
    seam = module._modules.get(NAME)
    if seam is None:
        seam = by_name.attach(module, query, key)
    with seam.refusals() if isinstance(seam, Recorder) else contextlib.nullcontext():
        return _attend(module, seam, query, key, value, attention_mask, scaling, dropout, is_causal, kwargs)


def _attend(
    module: nn.Module,
    seam: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict,
) -> tuple[Tensor, Tensor | None]:
    call = calls.taken(seam)
    if isinstance(seam, calls.Probe):
        seam.keys = key
        return value.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2).contiguous(), None
    refusals.check_call(kwargs)
    layer = call.cache_layer
    q_len, k_len = query.shape[2], key.shape[2] + (0 if layer is None else layer.positions)
    says = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if call.eager and attention_mask is None:
        says = False  # the eager attention goes by masks alone, whatever the module says of itself
    causal, padding = read_mask(attention_mask, causal=bool(says), q_len=q_len, k_len=k_len)
    if padding is not None and padding.shape[0] != query.shape[0]:
        padding = padding.expand(query.shape[0], -1)
    if q_len > k_len or (q_len < k_len and not causal):
        raise NotImplementedError(
            f"longvq attention: got {q_len} queries for {k_len} keys in {'causal' if causal else 'bidirectional'} "
            "attention; expected as many keys as queries (with a cache: more keys, causal). Cross-attention and "
            "prefixes can't be replaced; leave them out with filter_fn="
        )
    if value.shape[1] != key.shape[1]:
        raise NotImplementedError(
            f"longvq attention: got values of {value.shape[1]} heads for keys of {key.shape[1]}; expected as many"
        )
    far = None
    if call.rotation is not None:
        if not causal:
            raise NotImplementedError(
                'longvq attention: far_positions: "rectified" needs causal attention, got a bidirectional call; use '
                '"rotated"'
            )
        if key.shape[2] != q_len:
            raise NotImplementedError(
                f"longvq attention: got {q_len} queries for {k_len} keys of a cache that grows, whose keys can't be "
                "taken without their positions any more; call the model under torch.no_grad() in eval mode, with an "
                "empty cache at first, or use far_positions='rotated'"
            )
        far = seam.rotary(query, key, *call.rotation)
    if isinstance(seam, Recorder):
        if attention_mask is not None and attention_mask.dim() == 2:  # made by name: the original reads dense masks
            past = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril()
            attention_mask = attention_mask.bool()[:, None, None, :] & past
        output, weights = seam.original(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
        )
        options = {"causal": causal, "key_padding_mask": padding, "scale": scaling}
        seam.observe(query, key, value, output.transpose(1, 2), far=far, **options)
        return output, weights
    if layer is not None:
        padding = None if padding is None else layer.new_padding(padding, q_len)
        layer.positions += q_len
        output = seam.step(query, key, value, layer.state, padding, far=far, scale=scaling)
        return output.transpose(1, 2).contiguous(), None
    if q_len < k_len:  # the queries are the last positions; the earlier rows are computed and dropped
        query = torch.cat([query.new_zeros(*query.shape[:2], k_len - q_len, query.shape[3]), query], dim=2)
    output = seam(query, key, value, padding, far=far, causal=causal, scale=scaling)
    return output[:, :, k_len - q_len :].transpose(1, 2).contiguous(), None


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
