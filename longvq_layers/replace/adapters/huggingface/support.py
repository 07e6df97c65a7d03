"""Facts about a transformers attention module, and why it can't be replaced; read before the module is changed."""

import inspect
import types
from typing import Any

from torch import nn

from longvq_layers.replace.adapters.base import CROSS_ATTENTION, DROPOUT_NOTE

IMPLEMENTATION = "longvq"  # our name in transformers' registries, and the name of our options in a config
BIAS_NAMES = frozenset(
    {
        "alibi",
        "position_bias",
        "relative_attention_bias",
        "relative_position_bias",
        "relative_position_bias_table",
        "rel_pos_bias",
        "rel_pos_h",
        "distance_embedding",
    }
)
CROSS_NAMES = frozenset({"crossattention", "cross_attn", "cross_attention", "encoder_attn", "EncDecAttention"})
# Keyword arguments that change no score. Every other one that is set is refused by name.
HARMLESS = frozenset(
    {
        "cache",
        "cache_position",
        "input_ids",
        "inputs_embeds",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)
NO_ATTENTION_WEIGHTS = (
    "longvq attention: output_attentions must be False, got True, because attention weights are never formed (they "
    "would be L x L); pass output_attentions=False or restore_attention(model)"
)
_FULL = "full_attention"  # the layer type that sees all keys


def config_of(module: nn.Module) -> Any:
    """The module's transformers config, whose attributes depend on the model type."""
    return module.config


def forward_of(module: nn.Module) -> types.FunctionType:
    """The forward of the module's class, without decorators."""
    forward: types.FunctionType = inspect.unwrap(type(module).forward)
    return forward


def takes_part(module: nn.Module) -> bool:
    """Whether the module's forward finds its attention function in transformers' attention interface."""
    code = getattr(forward_of(module), "__code__", None)
    looks_it_up = code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
    return looks_it_up and hasattr(getattr(module, "config", None), "_attn_implementation")


def refusal(name: str, module: nn.Module) -> str | None:
    """Why this module keeps its attention, or None if it can be replaced."""
    config = config_of(module)
    implementation = config._attn_implementation
    if implementation not in ("eager", "sdpa", IMPLEMENTATION):
        return f"its attention is {implementation!r}; load the model with attn_implementation='sdpa'"
    if getattr(config, "output_attentions", False):
        return "config.output_attentions is True, but attention weights are never formed; set it to False"
    if _is_cross_attention(name, module):
        return CROSS_ATTENTION
    bias = _position_bias(module)
    if bias is not None:
        return f"additive position bias ({bias}): it has no linear-time form"
    window = _sliding_window(module)
    if isinstance(window, str) and not any(word in window for word in ("sliding", "chunked")):
        return f"layers of type {window!r}: only {_FULL!r} is known to see all keys"
    if window is not None:
        return f"sliding-window attention ({window}): it is linear already, and its far keys must stay hidden"
    if getattr(module, "sinks", None) is not None:
        return "attention sinks: an extra softmax term that isn't a key"
    cap = getattr(module, "attn_logit_softcapping", None)
    if cap is not None:
        return f"soft-capped scores (attn_logit_softcapping={cap})"
    return None


def notes(module: nn.Module) -> tuple[str, ...]:
    """What a user should know of this module once it is replaced."""
    return (DROPOUT_NOTE,) if _dropout(module) > 0 else ()


def check_keywords(kwargs: dict[str, object]) -> None:
    """Refuse, by name, every keyword argument of the attention function that could change a score.

    Raises:
        NotImplementedError: an argument that is set and not known to be harmless.
    """
    for name, value in kwargs.items():
        if value is None or value is False or name in HARMLESS:
            continue
        if name == "output_attentions":
            raise NotImplementedError(NO_ATTENTION_WEIGHTS)
        raise NotImplementedError(
            f"longvq attention: {name} must be None, got {type(value).__name__}, because this argument may change the "
            "attention scores and is not supported; don't pass it, or restore_attention(model)"
        )


def has_rotary(module: nn.Module) -> bool:
    """Whether its forward rotates queries and keys by their positions."""
    return any("rotary" in name or "rope" in name.lower() for name in _names(module))


def may_be_cross_attention(module: nn.Module) -> bool:
    """Whether its keys may come from an encoder. Only the module's name in a model can tell for sure."""
    takes_keys = "key_value_states" in inspect.signature(forward_of(module)).parameters
    return takes_keys and getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True)


def needs_keys(module: nn.Module) -> str | None:
    """Why the cache must keep this module's keys themselves; None if sums over keys are enough."""
    shared = getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False)
    if shared and getattr(module.config, "num_kv_shared_layers", 0):
        return "it shares its keys with another layer"
    try:
        source = inspect.getsource(forward_of(module))
    except OSError:
        return None
    return "it attends more than once with each key" if source.count("attention_interface(") > 1 else None


def sizes(module: nn.Module) -> tuple[int, int, int] | None:
    """(H, Hkv, D), read from attributes with the usual names; None if these don't give all sizes."""
    owners = (module, module.config)
    num_heads = _first_int(owners, ("num_heads", "num_attention_heads", "n_heads", "n_head"))
    num_kv_heads = _first_int(owners, ("num_key_value_heads", "num_kv_heads")) or num_heads
    head_dim = _first_int(owners, ("head_dim", "attention_head_size", "head_size", "dim_head"))
    hidden_size = _first_int(owners, ("embed_dim", "hidden_size", "d_model"))
    if head_dim is None and hidden_size is not None and num_heads:
        head_dim = hidden_size // num_heads
    return (
        None if num_heads is None or num_kv_heads is None or head_dim is None else (num_heads, num_kv_heads, head_dim)
    )


def trained_length(module: nn.Module) -> int | None:
    """The config's max_position_embeddings, or None."""
    length = _value(module.config, "max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else None


def _first_int(owners: tuple[object, ...], names: tuple[str, ...]) -> int | None:
    values = (_value(owner, name) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _value(owner: object, name: str) -> object:
    try:
        return getattr(owner, name, None)
    except RuntimeError:  # a config whose layers differ in this attribute
        return None


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    by_name = any(part in CROSS_NAMES for part in name.split(".")) or "CrossAttention" in type(module).__name__
    return by_name or bool(getattr(module, "is_cross_attention", False))


def _position_bias(module: nn.Module) -> str | None:
    if getattr(module.config, "alibi", False):
        return "alibi"
    if "relative" in str(getattr(module.config, "position_embedding_type", "")):
        return "relative position embeddings"
    code = forward_of(module).__code__
    known = {*_names(module), *code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]} | set(dir(module))
    return next((name for name in sorted(BIAS_NAMES) if name in known), None)


def _sliding_window(module: nn.Module) -> object | None:
    config = module.config
    if "sliding_window" in module.__dict__:
        return module.sliding_window
    layer_types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if layer_types is not None and isinstance(index, int) and index < len(layer_types):
        kind: object = layer_types[index]
        return None if kind == _FULL else kind
    code = forward_of(module).__code__
    reads_it = any("sliding_window" in str(text) for text in (*code.co_names, *code.co_consts))
    return getattr(config, "sliding_window", None) if reads_it else None


def _dropout(module: nn.Module) -> float:
    for name in ("attention_dropout", "dropout", "attn_dropout", "dropout_p"):
        value: object = getattr(module, name, None)
        value = getattr(value, "p", value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return 0.0


def _names(module: nn.Module) -> tuple[str, ...]:
    return forward_of(module).__code__.co_names
